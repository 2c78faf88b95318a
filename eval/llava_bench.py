"""`python eval/llava_bench.py answer | judge | score`: LLaVA-Bench (in the wild)."""

import sys
from importlib import import_module
from pathlib import Path

# So that it runs from any folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from revelio.door import fail, run_module

COMMANDS = {
    "answer": "a finished LLaVA model + the bench's images and questions -> answers.jsonl",
    "judge": "answers + the reference's answers -> reviews.jsonl, by an OpenAI-compatible judge",
    "score": "reviews -> the table of the paper's Table 10, with intervals, comparison, drift",
}
USAGE = "usage: python eval/llava_bench.py <command> [--config FILE] [flags]\n\n{doc}\n\ncommands:\n{rows}\n"


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit 2 with one line on a user's mistake, 130 on Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help", "help"):
        rows = "\n".join(f"  {name:<7} {summary}" for name, summary in COMMANDS.items())
        print(USAGE.format(doc="LLaVA-Bench (in the wild): answer, judge, score.", rows=rows))
        return
    name = words[0]
    if name not in COMMANDS:
        fail("llava_bench", f"unknown command {name!r}: choose from {', '.join(COMMANDS)}")
    run_module(
        import_module(f"eval.bench.commands.{name}"),
        words[1:],
        name="llava_bench",
        prog=f"llava_bench.py {name}",
        stopped="stopped; nothing is lost, a re-run continues",
    )


if __name__ == "__main__":
    main()
