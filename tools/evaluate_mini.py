"""Measure the shipped mini models: `docs/mini_models.json`, and `docs/mini_models.md` from it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from tools.mini.evaluate import SECTIONS, evaluate
from tools.mini.report import Inputs


def main(arguments: list[str]) -> int:
    """Measure and render; a user's mistake ends with one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help=f"sections: {', '.join(SECTIONS)}")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--runs", type=Path, default=Path("work/mini"), help="for partial results")
    parser.add_argument("--fashion-mnist", type=Path, help="folder of the four idx.gz files")
    parser.add_argument("--caltech101", type=Path, help="folder of images/, train.txt, test.txt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(flags.threads)
    inputs = Inputs(
        flags.models, flags.docs, flags.runs, flags.fashion_mnist, flags.caltech101, flags.seed
    )
    try:
        print(evaluate(inputs, flags.only))
    except ValueError as error:
        print(f"evaluate_mini: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
