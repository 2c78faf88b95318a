"""Where commands put their results: checked before the work, and never over what something else wrote.

A folder of results holds a record (``.revelio-files.json``) of the files that each command wrote there. Only
these are replaced or removed when the command is run again.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from revelio.files import check_folder, check_place, check_ways, names_in, write_folder, write_whole
from revelio.trust import file_in, path_in, printable, read_object

RECORD = ".revelio-files.json"


def replace_files(
    path: Path, maker: str, write: Callable[[Path], Any], needed: int | None = None
) -> None:
    """Write an output folder; of an earlier one, only the files that its record lists are replaced.

    Args:
        path: the folder; other files in it stay as they are.
        maker: which command's output it is: a folder may hold those of several.
        write: gets an empty folder.
        needed: bytes that it takes, where that is known.

    Raises:
        ValueError: a file that no record lists is in the way of a name.
        OSError: it can't be written.
    """
    record = read_record(path)
    earlier = record.get(maker, [])

    def fill(folder: Path) -> None:
        write(folder)
        names = names_in(folder)
        check_ways(path, names, earlier)
        # First, so that a stop in the middle leaves no file that nobody owns.
        if path.exists():
            _write_record(path, record | {maker: sorted({*earlier, *names})})
        else:
            _write_record(folder, {maker: names})

    names = write_folder(path, fill, owned=earlier, needed=needed)
    _write_record(path, record | {maker: sorted(set(names) - {RECORD})})


def check_replaceable(path: Path, maker: str, names: Sequence[str]) -> None:
    """See before the work whether :func:`replace_files` may write ``names`` into ``path``.

    Raises:
        ValueError: a file stands at ``path``, it can't be written, or one of the names is taken.
    """
    check_folder(path)
    check_ways(path, names, read_record(path).get(maker, []))


def read_record(path: Path) -> dict[str, list[str]]:
    """The names of the files in an output folder that Revelio wrote, by the command that did.

    Raises:
        ValueError: there is such a file and it is no record, it is a link, or a name in it leads out of the
            folder.
    """
    if not os.path.lexists(path / RECORD):
        return {}
    made = read_object(file_in(path, RECORD, what="the record of its files")).get("files")
    if not isinstance(made, dict) or not all(isinstance(names, list) for names in made.values()):
        raise ValueError(f"{printable(path / RECORD)} is no record of files: choose another folder")
    for names in made.values():
        for name in names:
            path_in(path, name, what="a file of an earlier output")
    return made


def check_file(path: Path, ours: Callable[[Path], object], what: str) -> None:
    """See before the work whether ``path`` may be written: it is absent, or an earlier result of ours.

    Args:
        path: the file.
        ours: whether the file that is there is such a result; a ValueError says no.
        what: such a result, for messages.

    Raises:
        ValueError: a folder or another file is there, or it can't be written.
    """
    check_place(path)
    check_folder(path.parent)
    if not path.exists():
        return
    try:
        known = ours(path)
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{printable(path)} is there and is not {what}: choose another file")


def has_keys(*keys: str) -> Callable[[Path], bool]:
    """Whether a file is a JSON object with all of these keys; for :func:`check_file`."""
    return lambda path: set(keys) <= set(read_object(path))


def _write_record(path: Path, files: dict[str, list[str]]) -> None:
    write_whole(path / RECORD, json.dumps({"format": 1, "files": files}, indent=1) + "\n")
