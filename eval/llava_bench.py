"""`python eval/llava_bench.py answer | judge | score`: LLaVA-Bench (in the wild)."""

import sys
from importlib import import_module
from pathlib import Path

# So that it runs from any folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.bench.door import enter

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
    if words[0] not in COMMANDS:
        allowed = ", ".join(COMMANDS)
        print(f"llava_bench: unknown command {words[0]!r}: choose from {allowed}", file=sys.stderr)
        sys.exit(2)
    enter(import_module(f"eval.bench.commands.{words[0]}"), words[1:], words[0])


if __name__ == "__main__":
    main()
