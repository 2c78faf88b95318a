"""Image files under a root, by split and class: what every folder layout is read into."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image

from revelio.data.contents import digest_of
from revelio.data.dataset import ImageDataset
from revelio.data.picture import read_picture
from revelio.data.splits import ALL, choose_split
from revelio.trust import printable

# What makes a file count as a picture when a folder is searched; its content decides how it is read.
SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pnm", ".jp2", ".avif", ".tga"),
    )
)


@dataclass(frozen=True)
class Listing:
    """Files with their class ids.

    Attributes:
        root: the folder that paths are relative to.
        classes: class names by class id; empty where there are no labels.
        splits: for each split, (path under ``root`` with forward slashes, class id); the one key
            is "" where there are no splits. Class ids are None where there are no labels.
    """

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[tuple[str, int | None]]]


@dataclass(frozen=True)
class FileReader:
    """Reads the picture of an index from its file; ids are paths under the root."""

    root: Path
    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        """The picture at ``index``; raises :class:`revelio.data.dataset.ImageError`."""
        return read_picture(self.root / self.paths[index], self.paths[index])

    def digest(self, index: int) -> str:
        """The hash of the file at ``index``."""
        return digest_of(self.root / self.paths[index])


def listed_dataset(listing: Listing, split: str | None, name: str) -> ImageDataset:
    """The images of one split (or ``all``) in the order of their sorted paths, which are their ids.

    Raises:
        ValueError: there is no such split, or a file is listed twice.
    """
    chosen = choose_split([key for key in listing.splits if key], split, str(listing.root))
    keys = list(listing.splits) if chosen in (None, ALL) else [chosen]
    entries = sorted(entry for key in keys for entry in listing.splits[key])
    paths = [path for path, _ in entries]
    for before, after in pairwise(paths):
        if before == after:
            raise ValueError(
                f"{printable(listing.root)} lists {printable(after)} twice: every image once"
            )
    labels = [label for _, label in entries if label is not None]
    return ImageDataset(
        name=name,
        split=chosen,
        classes=listing.classes,
        ids=paths,
        labels=labels if listing.classes else None,
        read=(reader := FileReader(listing.root, paths)),
        digest=reader.digest,
    )


def find_pictures(folder: Path, others: Sequence[Path] = ()) -> list[str]:
    """Paths of the pictures in ``folder`` and below, relative to it, with forward slashes, sorted.

    Hidden files and folders (``.DS_Store``, ``._photo.jpg``) are left out; links are followed, but for
    those that lead to pictures which are listed elsewhere: they would be there twice, or under another
    class. That is said by a warning, except for links back into ``folder`` itself.

    Args:
        folder: where to look.
        others: folders of the same data set whose pictures are listed in their own right.
    """
    own = os.path.realpath(folder)
    listed = {os.path.realpath(other) for other in others}
    found, seen = [], {own}
    for here, folders, files in os.walk(folder, followlinks=True):
        below = []
        for name in sorted(folders):
            path = os.path.join(here, name)
            real = os.path.realpath(path)
            # A link back to a folder above would never end.
            if name.startswith(".") or real in seen or (os.path.islink(path) and inside(real, own)):
                continue
            if os.path.islink(path) and any(overlap(real, place) for place in (own, *listed)):
                warnings.warn(
                    f"{printable(path)} is a link to {printable(real)}, whose pictures are listed on "
                    "their own: it is left out",
                    stacklevel=2,
                )
                continue
            seen.add(real)
            below.append(name)
        folders[:] = below
        prefix = os.path.relpath(here, folder).replace(os.sep, "/")
        stem = "" if prefix == "." else f"{prefix}/"
        found += [stem + name for name in files if is_picture(name)]
    return sorted(found)


def inside(path: str, folder: str) -> bool:
    """Whether the real path ``path`` is ``folder`` or below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def overlap(one: str, other: str) -> bool:
    """Whether one of two real paths holds the other, or they are the same."""
    return inside(one, other) or inside(other, one)


def is_picture(name: str) -> bool:
    """Whether a file of this name counts as a picture."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES
