"""Image files under a root, by split and class: what every folder layout is read into."""

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image

from revelio.data.config import Limits
from revelio.data.contents import digest_of
from revelio.data.dataset import ImageDataset
from revelio.data.picture import LIMITS, opens, read_picture, suffixes, why_unread
from revelio.data.splits import ALL, choose_split
from revelio.trust import printable
from revelio.wording import plural

# Folders that file servers, archivers and desktops make for themselves, with thumbnails of every picture.
# fmt: off
SERVICE = frozenset(
    ("@eadir", "#recycle", "@recycle", "@__thumb", "#snapshot", "$recycle.bin", "lost+found", "__macosx")
) | {"system volume information", "__pycache__"}
# What lies beside pictures and is none, by its name: it is passed over without a word.
BESIDE = frozenset(
    (".txt", ".md", ".rst", ".html", ".htm", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml")
) | {".toml", ".ini", ".cfg", ".log", ".py", ".ipynb", ".mat", ".npy", ".npz", ".parquet", ".arrow"}
BESIDE |= {".db", ".lnk", ".url", ".sh", ".lock"}
# fmt: on
NAMED_BESIDE = frozenset(("readme", "license", "licence", "copying", "makefile", "citation"))


@dataclass(frozen=True)
class Listing:
    """Files with their class ids.

    Attributes:
        root: the folder that paths are relative to.
        classes: class names by class id; empty where there are no labels.
        splits: for each split, (path under ``root`` with forward slashes, class id); the one key
            is "" where there are no splits. Class ids are None where there are no labels.
        doubts: what may be wrong with classes by folders: for a warning, unless a table gives the labels.
    """

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[tuple[str, int | None]]]
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileReader:
    """Reads the picture of an index from its file; ids are paths under the root."""

    root: Path
    paths: Sequence[str]
    limits: Limits = LIMITS

    def __call__(self, index: int) -> Image.Image:
        """The picture at ``index``; raises :class:`revelio.data.dataset.ImageError`."""
        return read_picture(self.root / self.paths[index], self.paths[index], self.limits)

    def digest(self, index: int) -> str:
        """The hash of the file at ``index``."""
        return digest_of(self.root / self.paths[index])


def listed_dataset(
    listing: Listing, split: str | None, name: str, limits: Limits = LIMITS
) -> ImageDataset:
    """The images of one split (or ``all``) in the order of their sorted paths, which are their ids.

    Raises:
        ValueError: there is no such split, a file is listed twice, or some splits have classes, others none.
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
    if labels and len(labels) < len(entries):
        without = next(path for path, label in entries if label is None)
        raise ValueError(
            f"{printable(listing.root)} has splits with classes and some without ({printable(without)}, "
            f"...): choose one split ({printable(', '.join(keys))})"
        )
    return ImageDataset(
        name=name,
        split=chosen,
        classes=listing.classes if labels else (),
        ids=paths,
        labels=labels or None,
        read=(reader := FileReader(listing.root, paths, limits)),
        digest=reader.digest,
    )


def find_pictures(
    folder: Path, others: Sequence[Path] = (), left_out: list[str] | None = None
) -> list[str]:
    """Paths of the pictures in ``folder`` and below, relative to it, with forward slashes, sorted.

    A picture is what its suffix says, and what Pillow opens where the suffix says nothing. Hidden files and
    service folders (``.DS_Store``, ``@eaDir``) are passed over; links are followed, but for those that lead
    to pictures which are listed elsewhere: they would be there twice, or under another class. That is said by
    a warning, except for links back into ``folder`` itself.

    Args:
        folder: where to look.
        others: folders of the same data set whose pictures are listed in their own right.
        left_out: gets the paths of the files that are no pictures, but might be taken for some.
    """
    own = os.path.realpath(folder)
    listed = {os.path.realpath(other) for other in others}
    known, found, seen = suffixes(), [], {own}
    for here, folders, files in os.walk(folder, followlinks=True):
        below = []
        for name in sorted(folders):
            path = os.path.join(here, name)
            real = os.path.realpath(path)
            # A link back to a folder above would never end.
            if is_service(name) or real in seen or (os.path.islink(path) and inside(real, own)):
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
        for name in files:
            if is_picture(os.path.join(here, name), known):
                found.append(stem + name)
            elif left_out is not None and not is_beside(name):
                left_out.append(os.path.join(here, name))
    return sorted(found)


def warn_of(root: Path, left_out: Sequence[str]) -> None:
    """Say how many files of which kind are left out, and why each kind is."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for path in left_out:
        kinds[os.path.splitext(path)[1].lower()].append(path)
    counted = sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    said = [
        f"{len(paths):,} {kind or 'without a suffix'} ({os.path.relpath(min(paths), root)}"
        f"{', ...' if len(paths) > 1 else ''}: {why_unread(kind)})"
        for kind, paths in counted[:5]
    ]
    more = f" and {plural(len(counted) - 5, 'more kind')}" if len(counted) > 5 else ""
    if said:
        count = plural(len(left_out), "file")
        warnings.warn(
            f"{printable(root)}: {count} left out: {printable(', '.join(said))}{more}", stacklevel=3
        )


def is_service(name: str) -> bool:
    """Whether a folder of this name is hidden, or a program's own."""
    return name.startswith(".") or name.casefold() in SERVICE


def is_beside(name: str) -> bool:
    """Whether a file of this name is known to be no picture: hidden, a list, a description."""
    stem, suffix = os.path.splitext(name.casefold())
    return name.startswith(".") or suffix in BESIDE or (not suffix and stem in NAMED_BESIDE)


def is_picture(path: str, known: frozenset[str]) -> bool:
    """Whether the file at ``path`` counts as a picture."""
    name = os.path.basename(path)
    if is_beside(name):
        return False
    if os.path.splitext(name)[1].lower() in known:
        return True
    return os.path.isfile(path) and opens(path)


def inside(path: str, folder: str) -> bool:
    """Whether the real path ``path`` is ``folder`` or below it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def overlap(one: str, other: str) -> bool:
    """Whether one of two real paths holds the other, or they are the same."""
    return inside(one, other) or inside(other, one)
