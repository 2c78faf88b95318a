"""Train one of the mini models: `python -m tools.train_mini --config tools/configs/mini-sd.yaml`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from tools.mini.train import Folders, read_config, train_mini


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a YAML under tools/configs/")
    parser.add_argument("--fashion-mnist", type=Path, help="folder of the four idx.gz files")
    parser.add_argument("--caltech101", type=Path, help="folder of images/, train.txt, test.txt")
    parser.add_argument("--cifar10", type=Path, help="parquet file of the training pictures")
    parser.add_argument("--out", type=Path, default=Path("work/mini"), help="where runs are kept")
    parser.add_argument("--minutes", type=float, help="train this long instead of the config's")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Train; a user's mistake ends with one line and status 2."""
    flags = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folders = Folders(flags.fashion_mnist, flags.caltech101, flags.cifar10)
    try:
        config = read_config(flags.config, flags.minutes)
        train_mini(config, folders, flags.out, resume=flags.resume, device=flags.device)
    except ValueError as error:
        print(f"train_mini: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
