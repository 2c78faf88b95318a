"""Write the shipped sample of Fashion-MNIST: `python -m tools.make_samples --fashion-mnist DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.mini.samples import write_samples


def main() -> None:
    """Write `revelio/samples/fashion-mnist.parquet`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fashion-mnist", type=Path, required=True, help="folder of the idx.gz files"
    )
    parser.add_argument("--out", type=Path, default=Path("revelio/samples/fashion-mnist.parquet"))
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    size = write_samples(flags.fashion_mnist, flags.out, flags.seed)
    print(f"{flags.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
