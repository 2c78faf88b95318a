"""A folder of images as a data set.

    ROOT/<class>/*.jpg                              class folders: labels are ids of the sorted names
    ROOT/<split>/<class>/*.jpg                      the same in splits (train, validation, test)
    ROOT/images/<class>/*.jpg + ROOT/<split>.txt    splits by lists of paths under images/
    ROOT/*.jpg, ROOT/**/*.jpg                       pictures directly in ROOT: no labels

Ids are paths under ROOT (under ROOT/images for lists), with forward slashes; the order is theirs, sorted.
"""

import os
import warnings
from itertools import pairwise
from pathlib import Path

from revelio.data.dataset import ImageDataset
from revelio.data.sources.listing import (
    Listing,
    find_pictures,
    inside,
    is_picture,
    listed_dataset,
    overlap,
)
from revelio.data.splits import SPLIT_NAMES
from revelio.trust import printable, read_text


def open_folder(path: Path, *, split: str | None = None, name: str | None = None) -> ImageDataset:
    """Open a folder of images.

    Args:
        path: the folder, in one of the layouts above.
        split: which split, where the layout has splits; ``all`` for every one.
        name: what results call the set; the folder's name if not given.

    Raises:
        ValueError: it is not there, is no folder, holds no pictures, a class folder holds none, or
            a list names a picture that is not there.
    """
    if not path.exists():
        raise ValueError(f"no folder at {printable(path)}: give a folder that holds images")
    if not path.is_dir():
        raise ValueError(f"{printable(path)} is a file: give a folder that holds images")
    return listed_dataset(read_folder(path), split, name or path.resolve().name)


def read_folder(path: Path) -> Listing:
    """The files of the folder ``path``, by split and class."""
    folders = _folders(path)
    lists = split_lists(path)
    if "images" in folders and lists:
        return read_lists(path / "images", lists)
    stray = _direct(path)
    if folders and all(folder in SPLIT_NAMES for folder in folders):
        _check_no_stray(path, stray, folders)
        return _split_folders(path, folders)
    if stray:
        return _plain(path, folders)
    if not folders:
        raise ValueError(
            f"{printable(path)} holds no images: give a folder of images or of class folders"
        )
    return Listing(path, tuple(folders), {"": _classes(path, "", folders)})


def split_lists(path: Path) -> dict[str, list[Path]]:
    """The list files ``train.txt``, ``test.txt``, ... in ``path``, by split."""
    found = {name: path / f"{name}.txt" for name in SPLIT_NAMES}
    return {name: [file] for name, file in found.items() if file.is_file()}


def read_lists(images: Path, lists: dict[str, list[Path]]) -> Listing:
    """Splits given by lists with one path under ``images`` a line (``accordion/image_0002.jpg``).

    A line whose file would be no picture (Caltech-101's lists name a ``BACKGROUND_Google/tmp``) is
    left out.

    Raises:
        ValueError: a listed picture is not there, or lies in no class folder.
    """
    folders = _folders(images)
    there = dict(_classes(images, "", folders))
    splits: dict[str, list[tuple[str, int | None]]] = {}
    for split, files in lists.items():
        lines = [line.strip() for file in files for line in _lines(file)]
        paths = [line for line in lines if is_picture(line)]
        missing = [path for path in paths if path not in there]
        if missing:
            names = " and ".join(file.name for file in files)
            raise ValueError(
                f"{names} lists {len(missing)} pictures that are not under {printable(images)}, "
                f"the first is {printable(missing[0])}: complete the folder or correct the list"
            )
        splits[split] = [(path, there[path]) for path in paths]
    return Listing(images, tuple(folders), splits)


def _plain(path: Path, folders: list[str]) -> Listing:
    pictures = find_pictures(path)
    beside = [folder for folder in folders if any(p.startswith(f"{folder}/") for p in pictures)]
    if beside:
        # Labels that vanish because of one stray picture must not vanish silently.
        stray = printable(next(p for p in pictures if "/" not in p))
        warnings.warn(
            f"{printable(path)} holds pictures ({stray}, ...) beside its folders ({printable(beside[0])}, "
            "...), so the folders are no classes and the images have no labels",
            stacklevel=2,
        )
    return Listing(path, (), {"": [(picture, None) for picture in pictures]})


def _split_folders(path: Path, splits: list[str]) -> Listing:
    below = {split: _folders(path / split) for split in splits}
    # One list for all splits, so that a class missing from one doesn't shift the ids of others.
    classes = sorted({folder for folders in below.values() for folder in folders})
    ids = {name: index for index, name in enumerate(classes)}
    entries: dict[str, list[tuple[str, int | None]]] = {}
    for split in splits:
        if below[split]:
            _check_no_stray(path / split, _direct(path / split), below[split])
        direct = find_pictures(path / split) if not below[split] else []
        if not below[split] and (classes or not direct):
            raise ValueError(
                f"{printable(path / split)} holds no class folders with images, as others do"
            )
        own = _classes(path, f"{split}/", below[split])
        entries[split] = [(file, ids[below[split][label or 0]]) for file, label in own]
        entries[split] += [(f"{split}/{file}", None) for file in direct]
    return Listing(path, tuple(classes), entries)


def _classes(path: Path, prefix: str, folders: list[str]) -> list[tuple[str, int | None]]:
    entries: list[tuple[str, int | None]] = []
    places = [path / prefix / folder for folder in folders]
    _check_apart(path / prefix, places)
    for label, (folder, place) in enumerate(zip(folders, places, strict=True)):
        pictures = find_pictures(place, [path, *places])
        if not pictures:
            raise ValueError(
                f"the class folder {printable(place)} holds no images: fill or remove it"
            )
        entries += [(f"{prefix}{folder}/{picture}", label) for picture in pictures]
    return entries


def _check_apart(path: Path, places: list[Path]) -> None:
    """Refuse class folders that are links to one another or to a folder above: no picture has two classes."""
    root = os.path.realpath(path)
    reals = [os.path.realpath(place) for place in places]
    for place, real in zip(places, reals, strict=True):
        if inside(root, real):
            raise ValueError(
                f"the class folder {printable(place)} is a link to {printable(real)}, which holds all "
                "classes: remove it"
            )
    # Sorted by parts, a folder comes right before what it holds.
    order = sorted(range(len(reals)), key=lambda number: reals[number].split(os.sep))
    for before, after in pairwise(order):
        if overlap(reals[before], reals[after]):
            raise ValueError(
                f"the class folders {printable(places[before])} and {printable(places[after])} are, by a "
                "link, the same pictures: remove one"
            )


def _direct(path: Path) -> list[str]:
    """The names of pictures directly in a folder."""
    return sorted(
        entry.name for entry in path.iterdir() if is_picture(entry.name) and entry.is_file()
    )


def _check_no_stray(path: Path, stray: list[str], folders: list[str]) -> None:
    if stray:
        raise ValueError(
            f"{printable(path)} holds pictures ({printable(stray[0])}, ...) beside its folders "
            f"({printable(folders[0])}, ...): move them into a folder they belong to, or away"
        )


def _folders(path: Path) -> list[str]:
    return sorted(e.name for e in path.iterdir() if e.is_dir() and not e.name.startswith("."))


def _lines(file: Path) -> list[str]:
    return read_text(file).split("\n")
