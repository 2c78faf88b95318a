"""`revelio llava-bench answer | judge | score`: LLaVA-Bench (in the wild).

`python eval/llava_bench.py` is the same.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":  # so that it runs from any folder, installed or not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import revelio.cli  # noqa: F401  first, so that a help page needs no torch
from revelio.command_line import choose, run_module

SUMMARY = "LLaVA-Bench (in the wild): answer, judge, score."
COMMANDS = {
    "answer": "a finished LLaVA model + the bench's images and questions -> answers.jsonl",
    "judge": "answers + the reference's answers -> reviews.jsonl, by an OpenAI-compatible judge",
    "score": "reviews -> the table of the paper's Table 10, with intervals, comparison, drift",
}


def find_module(name: str) -> ModuleType:
    """The module of a command: its docstring is the help page, its ``Config`` the flags."""
    return import_module(f"eval.bench.commands.{name}")


def main(arguments: list[str] | None = None, prog: str = "llava_bench") -> None:
    """Run one command; exit 2 with one line on a user's mistake, 130 on Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    if name := choose(words, COMMANDS, prog, SUMMARY):
        run_module(find_module(name), words[1:], name=prog.split()[0], prog=f"{prog} {name}")


if __name__ == "__main__":
    main()
