"""A folder of images as a data set.

    ROOT/<class>/*.jpg                              class folders: labels are ids of the sorted names
    ROOT/<split>/<class>/*.jpg                      the same in splits (train, validation, test)
    ROOT/images/<class>/*.jpg + ROOT/<split>.txt    splits by lists of paths under images/
    ROOT/*.jpg, ROOT/**/*.jpg                       pictures directly in ROOT: no labels

Ids are paths under ROOT (under ROOT/images for lists), with forward slashes; the order is theirs, sorted.
"""

import warnings
from pathlib import Path

from revelio.data.dataset import ImageDataset
from revelio.data.listing import Listing, find_pictures, is_picture, listed_dataset
from revelio.data.splits import SPLIT_NAMES


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
        raise ValueError(f"no folder at {path}: give a folder that holds images")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give a folder that holds images")
    return listed_dataset(read_folder(path), split, name or path.resolve().name)


def read_folder(path: Path) -> Listing:
    """The files of the folder ``path``, by split and class."""
    folders = _folders(path)
    lists = split_lists(path)
    if "images" in folders and lists:
        return read_lists(path / "images", lists)
    if any(is_picture(entry.name) for entry in path.iterdir() if entry.is_file()):
        return _plain(path, folders)
    if folders and all(folder in SPLIT_NAMES for folder in folders):
        return _split_folders(path, folders)
    if not folders:
        raise ValueError(f"{path} holds no images: give a folder of images or of class folders")
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
                f"{names} lists {len(missing)} pictures that are not under {images}, "
                f"the first is {missing[0]}: complete the folder or correct the list"
            )
        splits[split] = [(path, there[path]) for path in paths]
    return Listing(images, tuple(folders), splits)


def _plain(path: Path, folders: list[str]) -> Listing:
    pictures = find_pictures(path)
    beside = [folder for folder in folders if any(p.startswith(f"{folder}/") for p in pictures)]
    if beside:
        # Labels that vanish because of one stray picture must not vanish silently.
        warnings.warn(
            f"{path} holds pictures ({next(p for p in pictures if '/' not in p)}, ...) beside its "
            f"folders ({beside[0]}, ...), so the folders are no classes and the images have no labels",
            stacklevel=2,
        )
    return Listing(path, (), {"": [(picture, None) for picture in pictures]})


def _split_folders(path: Path, splits: list[str]) -> Listing:
    inside = {split: _folders(path / split) for split in splits}
    # One list for all splits, so that a class missing from one doesn't shift the ids of others.
    classes = sorted({folder for folders in inside.values() for folder in folders})
    ids = {name: index for index, name in enumerate(classes)}
    entries: dict[str, list[tuple[str, int | None]]] = {}
    for split in splits:
        direct = find_pictures(path / split) if not inside[split] else []
        if not inside[split] and (classes or not direct):
            raise ValueError(f"{path / split} holds no class folders with images, as others do")
        own = _classes(path, f"{split}/", inside[split])
        entries[split] = [(file, ids[inside[split][label or 0]]) for file, label in own]
        entries[split] += [(f"{split}/{file}", None) for file in direct]
    return Listing(path, tuple(classes), entries)


def _classes(path: Path, prefix: str, folders: list[str]) -> list[tuple[str, int | None]]:
    entries: list[tuple[str, int | None]] = []
    for label, folder in enumerate(folders):
        pictures = find_pictures(path / prefix / folder)
        if not pictures:
            raise ValueError(
                f"the class folder {path / prefix / folder} holds no images: fill or remove it"
            )
        entries += [(f"{prefix}{folder}/{picture}", label) for picture in pictures]
    return entries


def _folders(path: Path) -> list[str]:
    return sorted(e.name for e in path.iterdir() if e.is_dir() and not e.name.startswith("."))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no list of paths: it is not UTF-8 text") from error
