"""A folder of images as a data set.

    ROOT/<class>/*.jpg                              class folders: labels are ids of the sorted names
    ROOT/<split>/<class>/*.jpg                      the same in splits (train, Testing, val2017, ...)
    ROOT/images/<class>/*.jpg + ROOT/<split>.txt    splits by lists of paths under images/
    ROOT/*.jpg, ROOT/**/*.jpg                       pictures directly in ROOT: no labels
    any of these + metadata.csv or metadata.jsonl   labels by file name, as Hugging Face has them
    any of these + a table that the user names      labels by file name, as contests hand them out

A folder that holds nothing but one folder, as archives are unpacked, is stepped through. Ids are paths under
ROOT (under ROOT/images for lists), with forward slashes; the order is theirs, sorted.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from revelio.data.config import Limits
from revelio.data.dataset import ImageDataset
from revelio.data.picture import LIMITS, suffixes
from revelio.data.sources.label_table import with_table
from revelio.data.sources.listing import (
    Listing,
    find_pictures,
    inside,
    is_picture,
    is_service,
    listed_dataset,
    overlap,
    warn_of,
)
from revelio.data.sources.metadata import with_metadata
from revelio.data.splits import split_like, split_name
from revelio.trust import printable, read_text
from revelio.wording import plural

# Folders that describe the pictures of others, where they hold none themselves.
ABOUT = frozenset(
    ("annotations", "annotation", "labels", "label", "xml", "xmls", "imagesets", "meta", "metadata")
) | {"devkit", "attributes", "parts", "lists", "splits", "docs", "json", "csv"}
# Folders of masks, which are pictures of pictures.
MASKS = frozenset(("masks", "mask", "segmentation", "segmentations", "annotations", "labels", "gt"))


def open_folder(
    path: Path,
    *,
    split: str | None = None,
    name: str | None = None,
    label_column: str | None = None,
    labels: Path | None = None,
    limits: Limits = LIMITS,
) -> ImageDataset:
    """Open a folder of images.

    Args:
        path: the folder, in one of the layouts above.
        split: which split, where the layout has splits; ``all`` for every one.
        name: what results call the set; the folder's name if not given.
        label_column: the column of ``labels`` or ``metadata.csv`` with the labels; none: ``label`` where
            there is one.
        labels: a table of labels, read in the place of a ``metadata.csv``.
        limits: how large a picture may be.

    Raises:
        ValueError: it is not there, is no folder, holds no pictures, a class folder holds none, or
            a list names a picture that is not there.
    """
    if not path.exists():
        raise ValueError(f"no folder at {printable(path)}: give a folder that holds images")
    if not path.is_dir():
        raise ValueError(f"{printable(path)} is a file: give a folder that holds images")
    listing = read_folder(path)
    if labels is None:
        listing = with_metadata(listing, label_column, path)
    else:
        listing = with_table(listing, labels, label_column, path)
    for doubt in listing.doubts:
        warnings.warn(doubt, stacklevel=2)
    return listed_dataset(listing, split, name or path.resolve().name, limits)


def read_folder(path: Path) -> Listing:
    """The files of the folder ``path``, by split and class; says what is left out."""
    path, left_out, doubts = unwrapped(path), [], []
    folders = _folders(path)
    lists = split_lists(path)
    if "images" in folders and lists:
        return read_lists(path / "images", lists)
    stray = _stray(path)
    only_splits = bool(folders) and all(split_name(folder) is not None for folder in folders)
    splits = _splits(path, folders, doubts) if stray is None or only_splits else {}
    if splits:
        _check_no_stray(path, folders)
        listing = _split_folders(path, splits, left_out)
    elif stray is not None:
        listing = _plain(path, folders, left_out, doubts)
    elif folders:
        listing = Listing(path, tuple(folders), {"": _classes(path, "", folders, left_out)})
    else:
        find_pictures(path, left_out=left_out)
        warn_of(path, left_out)
        raise ValueError(
            f"{printable(path)} holds no images: give a folder of images or of class folders"
        )
    warn_of(path, left_out)
    return replace(listing, doubts=tuple(doubts))


def levels(path: Path) -> Iterator[Path]:
    """``path``, the folder that is all it holds, the one that is all that holds, and so on."""
    seen = set()
    while os.path.realpath(path) not in seen:
        seen.add(os.path.realpath(path))
        yield path
        folders = _folders(path)
        if len(folders) != 1 or _stray(path) is not None or split_lists(path):
            return
        if split_name(folders[0]) is not None:
            return
        path = path / folders[0]


def unwrapped(path: Path) -> Path:
    """The folder that the layout begins in: an archive's own folder around everything is stepped through."""
    *above, last = levels(path)
    # The last one is no wrapper but the only class, where it holds pictures.
    return above[-1] if above and _stray(last) is not None else last


def split_lists(path: Path) -> dict[str, list[Path]]:
    """The list files ``train.txt``, ``Test.txt``, ... in ``path``, by split."""
    found: dict[str, list[Path]] = {}
    for file in sorted(path.glob("*.[tT][xX][tT]")):
        if (name := split_name(file.stem)) is not None and file.is_file():
            found.setdefault(name, []).append(file)
    return found


def read_lists(images: Path, lists: dict[str, list[Path]]) -> Listing:
    """Splits given by lists with one path under ``images`` a line (``accordion/image_0002.jpg``).

    A line whose file would be no picture (Caltech-101's lists name a ``BACKGROUND_Google/tmp``) is
    left out.

    Raises:
        ValueError: a listed picture is not there, or a list names no picture at all.
    """
    folders, known = _folders(images), suffixes()
    flat = [] if folders else find_pictures(images)
    there: dict[str, int | None] = dict.fromkeys(flat) | dict(_classes(images, "", folders, []))
    splits: dict[str, list[tuple[str, int | None]]] = {}
    for split, files in lists.items():
        names = " and ".join(file.name for file in files)
        lines = [line.strip() for file in files for line in read_text(file).split("\n")]
        paths = [line for line in lines if line in there or Path(line).suffix.lower() in known]
        missing = [path for path in paths if path not in there]
        if missing:
            raise ValueError(
                f"{names} lists {plural(len(missing), 'picture that is', 'pictures that are')} not under "
                f"{printable(images)}, the first is {printable(missing[0])}: complete the folder or correct "
                "the list"
            )
        if not paths and any(lines):
            raise ValueError(
                f"{names} beside {printable(images)} names none of its pictures (the first line is "
                f"{printable(next(filter(None, lines))[:80])}): write one path a line and nothing else, or "
                "move it away"
            )
        splits[split] = [(path, there[path]) for path in paths]
    return Listing(images, tuple(folders), splits)


def _splits(path: Path, folders: list[str], doubts: list[str]) -> dict[str, str]:
    """The split folders by the names of their splits; none where the folders are classes.

    Raises:
        ValueError: some are, and some hold other pictures; or two are the same split.
    """
    named = {folder: name for folder in folders if (name := split_name(folder)) is not None}
    like = {folder: word for folder in folders if (word := split_like(folder)) is not None}
    if not named and len(like) < len(folders):
        doubts += _doubt_of_shared(path, folders)
        return {}
    others = [folder for folder in folders if folder not in like and find_pictures(path / folder)]
    if not others and len(like) > len(named):
        if _shared(path, list(like)):
            # Beside sure ones, or with the same classes in each, they are splits of their own names.
            named = {folder: named.get(folder, folder) for folder in like}
        elif not named and len(set(like.values())) > 1:
            _warn_of_like(path, folders)
    if not named:
        return {}
    others += [folder for folder in like if folder not in named and find_pictures(path / folder)]
    holders = [folder for folder in named if _stray(path / folder) is None]
    if others and (holders or len(set(named.values())) > 1):
        raise ValueError(
            f"{printable(path)} holds what look like splits ({printable(', '.join(named))}) beside other "
            f"folders of pictures ({printable(others[0])}, ...): move either away, or give one of them"
        )
    if others:
        warnings.warn(
            f"{printable(path)}: the folder {printable(next(iter(named)))} is taken as a class, like "
            f"{printable(others[0])} beside it, not as a split",
            stacklevel=3,
        )
        return {}
    found: dict[str, str] = {}
    for folder, name in named.items():
        if name in found:
            raise ValueError(
                f"{printable(path)} holds two folders for the split {name}, {printable(found[name])} and "
                f"{printable(folder)}: put them together, or move one away"
            )
        found[name] = folder
    return found


def _shared(path: Path, folders: list[str]) -> list[str]:
    """What folders in each of ``folders`` are called alike, where these hold no pictures of their own."""
    common: set[str] = set()
    for number, folder in enumerate(folders):
        place = unwrapped(path / folder)
        if _stray(place) is not None:
            return []
        below = set(_folders(place))
        common = below if number == 0 else common & below
        if len(common) < 2:
            return []
    return sorted(common) if len(folders) > 1 else []


def _doubt_of_shared(path: Path, folders: list[str]) -> list[str]:
    """That what is taken as classes may be splits, or another division of the same classes."""
    masks = [folder for folder in folders if folder.casefold() in MASKS]
    if len(folders) == 2 and len(masks) == 1:
        other = next(folder for folder in folders if folder not in masks)
        return [
            f"{printable(path)}: the folders {_first(folders)} are taken as classes: if "
            f"{printable(masks[0])} holds masks of the others, give {printable(path / other)}"
        ]
    if shared := _shared(path, folders):
        return [
            f"{printable(path)}: the folders {_first(folders)} are taken as classes, though each holds "
            f"the same folders ({_first(shared)}): if those are the classes, give one of the former, or "
            "call them train, validation and test"
        ]
    return []


def _warn_of_like(path: Path, folders: list[str]) -> None:
    warnings.warn(
        f"{printable(path)}: the folders {_first(folders)} are taken as classes, though they are called "
        "like splits: if they are, call them train, validation and test",
        stacklevel=4,
    )


def _first(names: list[str]) -> str:
    return printable(", ".join(names[:3]) + (", ..." if len(names) > 3 else ""))


def _plain(path: Path, folders: list[str], left_out: list[str], doubts: list[str]) -> Listing:
    pictures = find_pictures(path, left_out=left_out)
    beside = [folder for folder in folders if any(p.startswith(f"{folder}/") for p in pictures)]
    if beside:
        # Labels that vanish because of one stray picture must not vanish silently.
        stray = printable(next(p for p in pictures if "/" not in p))
        doubts.append(
            f"{printable(path)} holds pictures ({stray}, ...) beside its folders ({printable(beside[0])}, "
            "...), so the folders are no classes and the images have no labels"
        )
    return Listing(path, (), {"": [(picture, None) for picture in pictures]})


def _split_folders(path: Path, splits: dict[str, str], left_out: list[str]) -> Listing:
    places = _stepped(path, {name: _inner(path, folder) for name, folder in splits.items()})
    below = {name: _folders(path / place) for name, place in places.items()}
    # One list for all splits, so that a class missing from one doesn't shift the ids of others.
    classes = sorted({folder for folders in below.values() for folder in folders})
    ids = {name: index for index, name in enumerate(classes)}
    entries: dict[str, list[tuple[str, int | None]]] = {}
    for split, place in places.items():
        if below[split]:
            _check_no_stray(path / place, below[split])
        # Beside splits with classes there may be one without: the pictures of a contest to be submitted.
        direct = [] if below[split] else find_pictures(path / place, left_out=left_out)
        if not below[split] and not direct:
            raise ValueError(
                f"{printable(path / place)} holds no images, as other splits do: fill or remove it"
            )
        own = _classes(path, f"{place}/", below[split], left_out)
        entries[split] = [(file, ids[below[split][label or 0]]) for file, label in own]
        entries[split] += [(f"{place}/{file}", None) for file in direct]
    return Listing(path, tuple(classes), entries)


def _inner(path: Path, folder: str) -> str:
    """Where a split begins: archives wrap it in its own name once more (seg_train/seg_train/<class>)."""
    below = _folders(path / folder)
    if len(below) != 1 or _stray(path / folder) is not None:
        return folder
    names = [split_name(name) or name.casefold() for name in (folder, *below)]
    return f"{folder}/{below[0]}" if names[0] == names[1] else folder


def _stepped(path: Path, places: dict[str, str]) -> dict[str, str]:
    """Where splits begin that hold one folder, called alike, around their classes (train/images/<class>)."""
    below = [_folders(path / place) for place in places.values()]
    if len(below[0]) != 1 or any(names != below[0] for names in below):
        return places
    inner = {split: f"{place}/{below[0][0]}" for split, place in places.items()}
    around = [path / place for place in (*places.values(), *inner.values())]
    if any(_stray(place) is not None for place in around) or not all(map(_folders, around)):
        return places
    return _stepped(path, inner)


def _classes(
    path: Path, prefix: str, folders: list[str], left_out: list[str]
) -> list[tuple[str, int | None]]:
    entries: list[tuple[str, int | None]] = []
    places = [path / prefix / folder for folder in folders]
    _check_apart(path / prefix, places)
    for label, (folder, place) in enumerate(zip(folders, places, strict=True)):
        pictures = find_pictures(place, [path, *places], left_out)
        if not pictures:
            warn_of(path, left_out)
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


def _stray(path: Path) -> str | None:
    """A picture directly in a folder, where there is one: the first by name."""
    known = suffixes()
    with os.scandir(path) as entries:  # which asks nothing of a million files one by one
        files = sorted(entry.name for entry in entries if entry.is_file())
    return next((name for name in files if is_picture(os.path.join(path, name), known)), None)


def _check_no_stray(path: Path, folders: list[str]) -> None:
    stray = _stray(path)
    if stray is not None:
        raise ValueError(
            f"{printable(path)} holds pictures ({printable(stray)}, ...) beside its folders "
            f"({printable(folders[0])}, ...): move them into a folder they belong to, or away"
        )


def _folders(path: Path) -> list[str]:
    """The folders in a folder, without those that only describe the pictures of others."""
    with os.scandir(path) as entries:
        names = sorted(one.name for one in entries if one.is_dir() and not is_service(one.name))
    return [name for name in names if name.casefold() not in ABOUT or find_pictures(path / name)]
