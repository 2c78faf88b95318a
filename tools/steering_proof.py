"""Concept steering proven on mini-sd: erase each class of Fashion-MNIST, turn the others into it.

    python -m tools.steering_proof                 everything, into docs/steering.md and docs/steering.json
    python -m tools.steering_proof --page          only the page, from what work/steering holds
    python -m tools.steering_proof --repeats       only the denoiser route with a larger k-SAE, on three seeds
    python -m tools.steering_proof --blocks        only mini-dit's blocks, alone and together

Every method chooses its strength on seeds of its own (split `choose`) and is judged on others (`judge`). All
pictures are kept under work/, so that a stopped run goes on. About 2,500 of 32 px: ten minutes of
one processor core that nobody else uses.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from revelio.run_dir import write_json, write_whole
from revelio.trust import read_object
from tools.steering.methods import Methods
from tools.steering.page import JSON, PAGE, text, write_page
from tools.steering.repeats import BLOCKS, PICTURES, blocks, repeats
from tools.steering.report import report
from tools.steering.setting import DiTSetting, Setting

FASHION = Path("/usr/share/datasets/fashion-mnist")


def main(arguments: list[str]) -> int:
    """Draw what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("work/steering"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--fashion", type=Path, default=FASHION)
    parser.add_argument("--page", action="store_true", help="draw nothing, write what is there")
    parser.add_argument("--repeats", action="store_true", help="draw only the three seeds")
    parser.add_argument("--blocks", action="store_true", help="draw only mini-dit's blocks")
    asked = parser.parse_args(arguments)
    if asked.repeats or asked.blocks:
        _add(asked, repeats_too=asked.repeats, blocks_too=asked.blocks)
        return 0
    setting = Setting(asked.work, asked.fashion)
    found = report(setting, Methods(setting), draw=not asked.page)
    write_page(found, setting, asked.docs)
    dit = DiTSetting(asked.work / "dit", asked.fashion)
    found["dit"] = report(dit, Methods(dit), draw=not asked.page)
    write_page(found, setting, asked.docs)
    _add(asked, repeats_too=True, blocks_too=True)
    return 0


def _add(asked: argparse.Namespace, *, repeats_too: bool, blocks_too: bool) -> None:
    """The larger k-SAE on several seeds, and in mini-dit's blocks, put into the figures that are there."""
    found = read_object(asked.docs / JSON)
    settings: dict[str, Any] = {"fashion": asked.fashion, "pictures_a_class": PICTURES}
    if repeats_too:
        large = Setting(asked.work / "large", denoiser_layers=("up_ft1",), **settings)
        found["repeats"] = repeats(large)
    if blocks_too:
        dit = DiTSetting(asked.work / "dit-blocks", denoiser_layers=BLOCKS, **settings)
        found["blocks"] = blocks(dit)
    write_json(asked.docs / JSON, found)
    write_whole(asked.docs / PAGE, text(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
