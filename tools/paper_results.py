"""The paper's tables on the shipped models and held-out pictures, small: docs/results.md, docs/results.json.

    python -m tools.paper_results --fashion FOLDER --caltech FOLDER     (copies of both; an hour on one core)
    python -m tools.paper_results --fashion FOLDER --only table2a

Fashion-MNIST stands in for Oxford-IIIT Pet. All pictures are of the test splits, which the models were not
trained on; a fifth of them is held out for Diff-C. Rows that are done are not run again.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from revelio.config import to_plain
from revelio.data.config import DataConfig
from revelio.files import write_whole
from revelio.pipelines.reproduce import ReproduceConfig, reproduce
from revelio.reproduce.page import page
from revelio.reproduce.picture import picture
from revelio.reproduce.rows import SIZES
from revelio.run_dir import write_json
from revelio.trust import read_json

DOCS = Path(__file__).parents[1] / "docs"
ITEMS = ("table2a", "table2b", "table2d", "table3", "table7", "table8", "figure6")
# Of Caltech-101 alone.
CALTECH = ("table8",)
MINI = SIZES["mini"]
SMALL = replace(
    MINI,
    sae=replace(MINI.sae, expansion=8, steps=200),
    diffc=replace(MINI.diffc, width=32),
    train_images=3000,
    test_images=1000,
)
HEAD = """# The paper's tables in small

Rendered by `tools/paper_results.py` from `results.json`. The shipped models stand in for the paper's,
held-out Fashion-MNIST for Oxford-IIIT Pet: values cannot be compared with the paper's, orderings can.
Sizes are far below the paper's (`sizes` in the JSON), so that many orderings are not settled.
"""


def main() -> None:
    """Run the items, and render the page of all that were ever run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fashion", help="a copy of Fashion-MNIST; none: only render the page again"
    )
    parser.add_argument("--caltech", help="a copy of Caltech-101; none: its rows are left out")
    parser.add_argument("--only", choices=ITEMS, nargs="+", default=ITEMS, help="run these items")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-results"))
    given = parser.parse_args()
    path = DOCS / "results.json"
    results = read_json(path)["items"] if path.is_file() else {}
    for name in given.only if given.fashion else ():
        results[name] = reproduce(name, config_of(name, given), print_line, sizes=SMALL).result
        write_json(path, {"sizes": to_plain(SMALL), "items": results})
    pages = [_part(result) for result in results.values()]
    write_whole(DOCS / "results.md", "\n".join([HEAD, *pages]))


def _part(result: dict[str, Any]) -> str:
    """An item's part of the page; its picture is written beside it."""
    drawn, name = picture(result), f"results_{result['item']}.svg"
    if drawn:
        write_whole(DOCS / name, drawn)
    return page(result, name if drawn else "").replace("# ", "## ", 1)


def config_of(name: str, given: argparse.Namespace) -> ReproduceConfig:
    """On Fashion-MNIST in the place of Pets, and on Caltech-101."""
    fashion = DataConfig(source="fashion-mnist", root=Path(given.fashion), split="test")
    roots = (f"caltech101={given.caltech}",) if given.caltech else ()
    config = ReproduceConfig(out=given.out, scale="mini", device="cpu", roots=roots)
    return config if name in CALTECH else replace(config, data=fashion)


def print_line(step) -> None:
    """Say which row is at work."""
    if step.message.startswith(("row", "  can't")):
        print(step.message, flush=True)


if __name__ == "__main__":
    main()
