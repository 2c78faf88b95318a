"""Labels by a table that the user names: ``train.csv``, ``labels.tsv``, as contests hand them out.

    id,breed                            file;label
    000bec180eb18c7604dcecc8fe0dba07,pug    train/1.jpg;cat

One column names pictures, with or without their suffix and the folders above, and one holds classes. Where
that can be read in two ways it is refused, and what was read is said.
"""

import posixpath
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from revelio.data.sources.listing import Listing
from revelio.data.sources.metadata import (
    FILE_NAME,
    LABEL,
    labels_in,
    paths_under,
    relabelled,
    table_rows,
)
from revelio.trust import printable
from revelio.wording import plural


class _Names:
    """The pictures that a cell may mean: those whose path ends with what it says, or is how that ends."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._whole: defaultdict[str, list[str]] = defaultdict(list)
        self._ends: defaultdict[str, list[str]] = defaultdict(list)
        for path in paths:
            for name in (path, posixpath.splitext(path)[0]):
                self._whole[name].append(path)
                for end in _ends(name):
                    self._ends[end].append(path)

    def meant(self, cell: Any) -> list[str]:
        """The pictures' paths; several where it is not clear which."""
        if cell is None:
            return []
        name = posixpath.normpath(str(cell).strip().replace("\\", "/"))
        if len(self._whole.get(name, ())) == 1:
            return self._whole[name]
        longer = (self._whole[end] for end in _ends(name) if end in self._whole)
        return self._ends.get(name) or next(longer, [])


def _ends(path: str) -> Iterator[str]:
    """A path without its first folders: none of them, one, two, ..."""
    parts = path.split("/")
    return ("/".join(parts[first:]) for first in range(len(parts)))


def with_table(listing: Listing, table: Path, column: str | None, top: Path) -> Listing:
    """The listing with the labels of a table, which is CSV, TSV, JSON lines or parquet by its suffix.

    Args:
        listing: a folder's pictures; those that no row names are left out, and counted by a warning.
        table: the file, wherever it lies.
        column: the labels'; none: ``label``, or the only one beside the pictures' names.
        top: the folder that was given, which may wrap the listing's root.

    Raises:
        ValueError: the file is broken, or it is not clear which column names pictures, which holds labels,
            or which picture or class a row means.
    """
    where, rows = printable(table), table_rows(table)
    if not rows:
        raise ValueError(
            f"{where} has no rows below its header: give a table of pictures and labels"
        )
    names = _Names(paths_under(listing, top))
    named = _naming(rows, names, where, top, column)
    wanted = _labelling(list(rows[0]), named, column, where)
    labels: dict[str, Any] = {}
    missing: list[str] = []
    for row, label in zip(rows, labels_in(rows, wanted, where), strict=True):
        found = names.meant(row.get(named))
        if len(found) > 1:
            raise ValueError(
                f"{where} says {printable(row.get(named))!r}, and several pictures are called so "
                f"({printable(found[0])}, {printable(found[1])}): write their paths, or give one folder"
            )
        if not found:
            missing.append(str(row.get(named)))
        elif labels.setdefault(found[0], label) != label:
            raise ValueError(
                f"{where} gives {printable(found[0])} the label {printable(label)}, and "
                f"{printable(labels[found[0]])} stood before: keep one of the two"
            )
    if missing:
        raise ValueError(
            f"{where} names {plural(len(missing), 'picture that is', 'pictures that are')} not in "
            f"{printable(top)}, the first is {printable(missing[0])}: complete the folder or "
            "correct the table"
        )
    labelled = relabelled(listing, labels, top, where)
    warnings.warn(
        f"{printable(top)}: labels are read from {where}: {printable(named)!r} names "
        f"{plural(len(labels), 'picture')}, {printable(wanted)!r} holds "
        f"{plural(len(labelled.classes), 'class', 'classes')}",
        stacklevel=4,
    )
    return labelled


def _naming(
    rows: Sequence[dict[str, Any]], names: _Names, where: str, top: Path, label: str | None
) -> str:
    """The column that names pictures: all its cells do, and no other column's, or it says so itself."""
    columns = [name for name in rows[0] if name not in (LABEL, label)]
    if FILE_NAME in columns:
        return FILE_NAME
    if any(names.meant(name) for name in rows[0]):
        raise ValueError(
            f"{where} has no header line: write the names of its columns above the first, such as id,label"
        )
    hits = {name: sum(bool(names.meant(row.get(name))) for row in rows) for name in columns}
    full = [name for name in columns if hits[name] == len(rows)]
    # Class numbers may be pictures' names, too, but they come again and again.
    full = [name for name in full if len({str(row.get(name)) for row in rows}) == len(rows)] or full
    if len(full) > 1:
        raise ValueError(
            f"in {where} the columns {printable(' and '.join(full))} both name pictures: call the one that "
            f"is meant {FILE_NAME}"
        )
    most = max(columns, key=lambda name: hits[name], default=None)
    if most is None or not hits[most]:
        raise ValueError(
            f"{where} names no picture of {printable(top)} in any column ({printable(', '.join(rows[0]))}): "
            "give the table of these pictures, or their folder"
        )
    return full[0] if full else most


def _labelling(columns: Sequence[str], named: str, wanted: str | None, where: str) -> str:
    """The column that holds the labels."""
    others = [name for name in columns if name != named]
    if wanted is None:
        wanted = LABEL if LABEL in others or len(others) != 1 else others[0]
    if wanted not in others:
        raise ValueError(
            f"{where} has no column {printable(wanted)!r} of labels: choose another label_column "
            f"({printable(', '.join(others)) or 'there is none beside the names'})"
        )
    return wanted
