"""Labels by file name: the ``metadata.csv``, ``.jsonl`` and ``.parquet`` of Hugging Face's image folders.

    file_name,label                     {"file_name": "0001.png", "label": "cat"}
    0001.png,cat

Names are relative to the folder of the file, which may be any one above the pictures that it names: the data
set's own, a split's, a class's, or one that only wraps the others.
"""

import posixpath
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revelio.data.sources.labels import class_ids
from revelio.data.sources.listing import Listing, is_service
from revelio.data.sources.parquet import METADATA, parquet_rows
from revelio.trust import printable, read_csv, read_json_lines, regular_file

NAMES = ("metadata.csv", "metadata.jsonl", METADATA)
FILE_NAME = "file_name"
LABEL = "label"
HEAD_BYTES = 1 << 16


def with_metadata(listing: Listing, column: str | None, top: Path) -> Listing:
    """The listing with the labels that metadata files give, where there are some with this column.

    Args:
        listing: a folder's pictures; those that no row names are left out, and counted by a warning.
        column: the labels'; none: ``label``, where there is one.
        top: the folder that was given, which may wrap the listing's root.

    Raises:
        ValueError: a file is broken, a row names a picture that is not there or has no label where others
            have one, rows give a picture two labels, or the column that was asked for is nowhere.
    """
    files = _files(listing, top)
    labels: dict[str, Any] = {}
    for file in files:
        for path, label in _labels(file, top, column):
            if path in labels and labels[path] != label:
                raise ValueError(
                    f"{printable(file)} gives {printable(path)} the label {printable(label)}, and "
                    f"{printable(labels[path])} stood before: keep one of the two"
                )
            labels[path] = label
    if not labels:
        if column is not None:
            what = (
                "no metadata.csv or metadata.jsonl"
                if not files
                else "no such column in its metadata"
            )
            raise ValueError(
                f"label_column is {column!r}, and {printable(top)} has {what}: leave it out"
            )
        if len(listing.classes) < 2:
            _warn_of_tables(listing, top)
        return listing
    return _relabelled(listing, labels, top)


def _warn_of_tables(listing: Listing, top: Path) -> None:
    """Say that a table of pictures without labels is there under another name, and so is not read."""
    paths = [path for pictures in listing.splits.values() for path, _ in pictures]
    names = {posixpath.basename(path) for path in paths}
    names |= {posixpath.splitext(name)[0] for name in names}
    naming = [file.name for file in sorted(top.glob("*.[cCtT][sS][vV]"))
              if file.name not in NAMES and not names.isdisjoint(_first_cells(file))]  # fmt: skip
    if naming:
        shown = (listing.root / paths[0]).relative_to(top).as_posix()
        warnings.warn(
            f"{printable(top)}: {printable(' and '.join(naming[:3]))} names pictures and is not read: labels "
            f"are read from a metadata.csv with the columns file_name (such as {printable(shown)}) and label",
            stacklevel=4,
        )


def _first_cells(file: Path) -> set[str]:
    """What stands in the first two rows of a table, without folders; the others may be millions."""
    try:
        with regular_file(file).open("rb") as opened:
            rows = opened.read(HEAD_BYTES).decode("utf-8-sig", "replace").splitlines()[:2]
    except (OSError, ValueError):
        return set()
    cells = (cell.strip(" \"'") for row in rows for cell in re.split("[,;\t]", row))
    return {posixpath.basename(cell) for cell in cells}


def _files(listing: Listing, top: Path) -> list[Path]:
    """The metadata files of every folder above a listed picture, and of those directly in the root."""
    root = listing.root
    inner = (one for one in root.iterdir() if one.is_dir() and not is_service(one.name))
    folders = {top, root, *root.parents, *inner}
    # A million pictures lie in far fewer folders.
    holding = {
        path.rpartition("/")[0] for pictures in listing.splits.values() for path, _ in pictures
    }
    for folder in holding:
        place = root / folder
        while place not in folders:
            folders.add(place)
            place = place.parent
    below = sorted(folder for folder in folders if folder.is_relative_to(top))
    return [folder / name for folder in below for name in NAMES if (folder / name).is_file()]


def _labels(file: Path, top: Path, column: str | None) -> list[tuple[str, Any]]:
    """For each row of a metadata file the picture's path under ``top``, and its label."""
    rows = _rows(file)
    columns = list(rows[0]) if rows else []
    wanted = LABEL if column is None else column
    if FILE_NAME not in columns or wanted not in columns:
        missing = FILE_NAME if FILE_NAME not in columns else wanted
        warnings.warn(
            f"{printable(file)} has no column {missing!r} ({printable(', '.join(map(str, columns)))}): it "
            "gives no labels",
            stacklevel=4,
        )
        return []
    above = file.parent.relative_to(top).as_posix()
    return [(_joined(above, str(row.get(FILE_NAME))), row.get(wanted)) for row in rows]


def _joined(above: str, name: str) -> str:
    """A row's path, whichever way the slashes of its author's system lean."""
    return posixpath.normpath(posixpath.join(above, name.replace("\\", "/")))


def _rows(file: Path) -> Sequence[dict[str, Any]]:
    if file.name == METADATA:
        return parquet_rows(file)
    if file.suffix == ".jsonl":
        return read_json_lines(file)
    # An empty cell is none: as a name it would be a class without one.
    rows: list[dict[str, Any]] = [
        {name: cell or None for name, cell in row.items()} for row in read_csv(file)
    ]
    # Columns of whole numbers are read as such, so that 10 comes after 9.
    for column in rows[0] if rows else ():
        held = [row[column] for row in rows if row[column] is not None]
        if held and all(cell.isdecimal() for cell in held):
            for row in rows:
                row[column] = None if row[column] is None else int(row[column])
    return rows


def _relabelled(listing: Listing, labels: dict[str, Any], top: Path) -> Listing:
    """The listing with the labels of paths under ``top``."""
    where, entries = printable(top), listing.splits.items()
    above = listing.root.relative_to(top).as_posix()
    prefix = "" if above == "." else f"{above}/"
    listed = {prefix + path for _, pictures in entries for path, _ in pictures}
    missing = [path for path in labels if path not in listed]
    if missing:
        raise ValueError(
            f"the metadata of {where} names {len(missing)} pictures that are not there, the first is "
            f"{printable(missing[0])}: complete the folder or correct the list"
        )
    if unnamed := sorted(listed - set(labels)):
        warnings.warn(
            f"{where}: {len(unnamed):,} pictures are left out, as its metadata does not name them "
            f"({printable(unnamed[0])}, ...)",
            stacklevel=4,
        )
    classes, ids = class_ids(
        list(labels.values()), list(labels.values()), f"the metadata of {where}"
    )
    known = dict.fromkeys(labels) if ids is None else dict(zip(labels, ids, strict=True))
    splits = {
        split: [(path, known[prefix + path]) for path, _ in pictures if prefix + path in known]
        for split, pictures in entries
    }
    return Listing(listing.root, classes, {split: some for split, some in splits.items() if some})
