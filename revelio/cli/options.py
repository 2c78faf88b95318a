"""Builders that several commands share: a config becomes the opened thing.

The libraries behind them are imported when a builder runs, so that ``--help`` needs none.
"""

from typing import TYPE_CHECKING

from revelio.backbones.config import BackboneConfig
from revelio.data.config import DataConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from revelio.backbones.base import Backbone
    from revelio.data.dataset import ImageDataset


def build_dataset(options: DataConfig) -> "ImageDataset":
    """Open the data set that the options name."""
    from revelio.data.open import open_dataset

    return open_dataset(options)


def read_contents(dataset: "ImageDataset") -> "ImageDataset":
    """The data set with the hashes of its pictures, which are read now, under a bar that begins at once."""
    if dataset.digest is None:
        return dataset
    from tqdm import tqdm

    count = len(dataset)
    with tqdm(total=count, desc=f"reading {count:,} pictures", unit="image") as bar:
        return dataset.hashed(bar.update)


def build_backbone(options: BackboneConfig, layers: "Sequence[str] | None") -> "Backbone":
    """Load the backbone, cut after the last of ``layers``."""
    from revelio.backbones.registry import load_backbone

    return load_backbone(options, layers=layers)
