"""k-SAEs of cells against k-SAEs of pooled rows, on real pictures: docs/cells.md, docs/cells.json.

    python -m tools.cells_proof --caltech FOLDER        all three models: an hour of one core
    python -m tools.cells_proof --caltech FOLDER --only fashion

At equal rows and equal latents: by `eval-ksae` beside its controls, by `locality`, and which of the paper's
orderings hold; three trainings each. All that is made is kept under --work, so that a stopped run goes on.
"""

import argparse
import sys
from pathlib import Path

from revelio.pipelines import Progress
from tools.cells.page import write_page
from tools.cells.report import report
from tools.cells.setting import SETTINGS, Work

FASHION = Path("/usr/share/datasets/fashion-mnist")


def main(arguments: list[str]) -> int:
    """Make what is missing, and write the page once all of it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--caltech", type=Path, required=True, help="a copy of Caltech-101")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="Fashion-MNIST's idx files")
    parser.add_argument("--work", type=Path, default=Path("work/cells"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    names = [one.name for one in SETTINGS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these models")
    asked = parser.parse_args(arguments)
    work = Work(asked.work, {"caltech101": asked.caltech, "fashion-mnist": asked.fashion})
    chosen = [one for one in SETTINGS if one.name in asked.only]
    write_page(work, report(work, chosen, say), asked.docs)
    return 0


def say(step: Progress) -> None:
    """Say what begins and what was written."""
    if step.message:
        print(step.message, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
