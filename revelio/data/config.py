"""The settings of a data set: the one declaration that commands inherit and :func:`open_dataset` takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from revelio.bounds import Count, PathFields, Pictures, Place


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large a picture may be: a few kilobytes could ask for any amount of memory."""

    max_pixels: Count = 2**27
    """Pixels of the largest picture that is decoded; 2^27 take 0.4 GB as RGB."""

    max_ratio: Count = 100
    """The largest ratio of the longer side to the shorter: the shorter is brought to the model's size, and
    the longer grows with it."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Limits, PathFields):
    """Where the images come from."""

    first: ClassVar[tuple[str, ...]] = (
        "source",
        "split",
        "root",
        "label_column",
        "labels",
        "limit",
    )

    source: Annotated[str, Pictures()] = "samples"
    """A folder of images (class folders give labels), a known data set (samples, caltech101,
    oxford-iiit-pet, fgvc-aircraft, ...), a parquet file, or a Hugging Face dataset (folder on disk or hub
    id)."""

    split: str | None = None
    """The split to take; none: the source's own default (train where there are splits)."""

    root: Annotated[Path, Place("file or folder", exists=True), Pictures()] | None = None
    """A local copy of a known data set; none: its hub id."""

    revision: str | None = None
    """The revision of a hub id: a branch, tag or commit."""

    image_column: str = "image"
    """The column of a Hugging Face dataset that holds the pictures."""

    label_column: str | None = None
    """The column with class names or ids; none: the known data set's own, or `label` where there is one."""

    labels: Annotated[Path, Place("file", exists=True)] | None = None
    """A table of a folder's labels (CSV, TSV, JSON lines, parquet): one column names pictures, with or
    without suffix, and one holds classes; none: a `metadata.csv` in the folder, where there is one."""

    limit: Count | None = None
    """Take only this many images, spread evenly over the data set."""

    per_class: Count | None = None
    """Take only the first so many images of each class."""

    on_error: Literal["stop", "skip"] = "stop"
    """What to do with unreadable images: stop the run, or record them as skipped."""
