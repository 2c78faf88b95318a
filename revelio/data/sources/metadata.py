"""Labels by file name: the ``metadata.csv``, ``.jsonl`` and ``.parquet`` of Hugging Face's image folders.

    file_name,label                     {"file_name": "0001.png", "label": "cat"}
    0001.png,cat

Names are relative to the folder of the file, which may be any one above the pictures that it names: the data
set's own, a split's, a class's, or one that only wraps the others.
"""

import posixpath
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revelio.data.sources.labels import class_ids, one_each
from revelio.data.sources.listing import Listing, is_service
from revelio.data.sources.parquet import METADATA, parquet_rows
from revelio.trust import printable, read_csv, read_json_lines, read_text, regular_file
from revelio.wording import plural

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
    return relabelled(listing, labels, top, f"the metadata of {printable(top)}")


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
            f"{printable(top)}: {printable(' and '.join(naming[:3]))} names pictures and is not read: give "
            "it as labels, or call it metadata.csv, with the columns file_name (such as "
            f"{printable(shown)}) and label",
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
    rows = table_rows(file)
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
    names = (_joined(above, str(row.get(FILE_NAME))) for row in rows)
    return list(zip(names, labels_in(rows, wanted, printable(file)), strict=True))


def _joined(above: str, name: str) -> str:
    """A row's path, whichever way the slashes of its author's system lean."""
    return posixpath.normpath(posixpath.join(above, name.replace("\\", "/")))


def table_rows(file: Path) -> Sequence[dict[str, Any]]:
    """The rows of a table by column: parquet, JSON lines, or CSV of commas, semicolons or tabs.

    Raises:
        ValueError: it can't be read as what its suffix says.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return parquet_rows(file)
    if suffix == ".jsonl":
        return read_json_lines(file)
    # An empty cell is none: as a name it would be a class without one.
    rows = read_csv(file, _delimiter(file))
    return [{name: cell or None for name, cell in row.items()} for row in rows]


def _delimiter(file: Path) -> str:
    """What stands between the cells of the header line; a comma where nothing does."""
    head = next(iter(read_text(file).splitlines()), "")
    return max(",;\t", key=head.count)


def labels_in(rows: Sequence[dict[str, Any]], column: str, where: str) -> list[Any]:
    """A column's labels; a CSV's whole numbers as such, so that 10 comes after 9.

    Raises:
        ValueError: a list does not hold one.
    """
    found = one_each([row.get(column) for row in rows], where)
    held = [label for label in found if label is not None]
    if held and all(isinstance(label, str) and label.isdecimal() for label in held):
        return [None if label is None else int(label) for label in found]
    return found


def paths_under(listing: Listing, top: Path) -> list[str]:
    """The listed pictures' paths under ``top``, which may wrap the listing's root."""
    prefix = _prefix(listing, top)
    return [prefix + path for pictures in listing.splits.values() for path, _ in pictures]


def _prefix(listing: Listing, top: Path) -> str:
    above = listing.root.relative_to(top).as_posix()
    return "" if above == "." else f"{above}/"


def relabelled(listing: Listing, labels: Mapping[str, Any], top: Path, what: str) -> Listing:
    """The listing with the labels of paths under ``top``, which ``what`` gives.

    Raises:
        ValueError: a path is not listed, or the labels are no classes.
    """
    prefix, listed = _prefix(listing, top), set(paths_under(listing, top))
    missing = [path for path in labels if path not in listed]
    if missing:
        raise ValueError(
            f"{what} names {plural(len(missing), 'picture that is', 'pictures that are')} not there, the "
            f"first is {printable(missing[0])}: complete the folder or correct the list"
        )
    classes, ids = class_ids(list(labels.values()), list(labels.values()), what)
    if unnamed := sorted(listed - set(labels)):
        warnings.warn(
            f"{printable(top)}: {plural(len(unnamed), 'picture is', 'pictures are')} left out, as {what} "
            f"does not name them ({printable(unnamed[0])}, ...)",
            stacklevel=4,
        )
    known = dict.fromkeys(labels) if ids is None else dict(zip(labels, ids, strict=True))
    splits = {
        split: [(path, known[prefix + path]) for path, _ in pictures if prefix + path in known]
        for split, pictures in listing.splits.items()
    }
    return Listing(listing.root, classes, {split: some for split, some in splits.items() if some})
