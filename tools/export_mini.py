"""Put finished mini models into `models/` in half precision, each with its card."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from revelio.data.builtin import FASHION_CLASSES
from revelio.run_dir import write_whole
from tools.mini.captions import noun
from tools.mini.cards import SECTIONS, card
from tools.mini.export import export
from tools.mini.report import read_report
from tools.mini.train import read_config


def main() -> None:
    """Export the named models, or only renew their cards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SECTIONS), help="default: all")
    parser.add_argument("--configs", type=Path, default=Path("tools/configs"))
    parser.add_argument("--runs", type=Path, default=Path("work/mini"))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--report", type=Path, default=Path("docs/mini_models.json"))
    parser.add_argument("--cards-only", action="store_true", help="leave the weights as they are")
    flags = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    for name in flags.names:
        source, target = flags.configs / f"{name}.yaml", flags.models / name
        if not flags.cards_only:
            export(flags.runs, read_config(source), target, [noun(n) for n in FASHION_CLASSES])
        text = card(name, source, flags.runs / name, read_report(flags.report))
        write_whole(target / "README.md", text)
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        print(f"{target}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
