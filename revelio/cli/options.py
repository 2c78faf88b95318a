"""Options that several commands share, and the builders that turn them into arguments.

The libraries behind them are imported when a builder runs, so that ``--help`` needs none.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from revelio.bounds import Count, Device, Existing, Pixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from revelio.backbones.base import Backbone
    from revelio.data.dataset import ImageDataset


@dataclass(frozen=True)
class DataOptions:
    """Where the images come from."""

    source: str = "samples"
    """A folder of images (class folders give labels), a recipe (samples, caltech101, oxford-iiit-pet,
    fgvc-aircraft, ...), a parquet file, or a Hugging Face dataset (folder on disk or hub id)."""

    split: str | None = None
    """The split to take; none: the source's own default (train where there are splits)."""

    root: Existing | None = None
    """A local copy of a recipe's data; none: the recipe's hub id."""

    revision: str | None = None
    """The revision of a hub id: a branch, tag or commit."""

    image_column: str = "image"
    """The column of a Hugging Face dataset that holds the pictures."""

    label_column: str | None = None
    """The column with class ids; none: the recipe's own, or `label` where there is one."""

    limit: Count | None = None
    """Take only this many images, spread evenly over the data set."""

    per_class: Count | None = None
    """Take only the first so many images of each class."""

    on_error: Literal["stop", "skip"] = "stop"
    """What an unreadable image does: stop the run, or be recorded as skipped."""


@dataclass(frozen=True)
class BackboneOptions:
    """The model whose activations are taken."""

    name: str = "mini-sd"
    """A name that `revelio backbones` lists, a folder, or a hub id."""

    revision: str | None = None
    """The revision of a hub id."""

    image_size: Pixels | None = None
    """The side of the square the images are brought to, in pixels; none: the model's own."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The number format the model runs in."""

    attention: Literal["sdpa", "eager"] = "sdpa"
    """The attention kernel."""

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""


def build_dataset(options: DataOptions) -> "ImageDataset":
    """Open the data set that the options name."""
    from revelio.data.open import open_dataset

    return open_dataset(
        options.source,
        split=options.split,
        root=options.root,
        revision=options.revision,
        image_column=options.image_column,
        label_column=options.label_column,
        limit=options.limit,
        per_class=options.per_class,
    )


def read_contents(dataset: "ImageDataset") -> "ImageDataset":
    """The data set with the hashes of its pictures, which are read now, under a bar that begins at once."""
    if dataset.digest is None:
        return dataset
    from tqdm import tqdm

    count = len(dataset)
    with tqdm(total=count, desc=f"reading {count:,} pictures", unit="image") as bar:
        return dataset.hashed(bar.update)


def build_backbone(options: BackboneOptions, layers: "Sequence[str] | None") -> "Backbone":
    """Load the backbone, cut after the last of ``layers``."""
    from revelio.backbones.registry import load_backbone

    return load_backbone(
        options.name,
        layers=layers,
        revision=options.revision,
        image_size=options.image_size,
        dtype=options.dtype,
        attention=options.attention,
        device=options.device,
    )
