"""Where commands put their results: checked before the work, and never over what something else wrote.

A folder of results holds a record (``.revelio-files.json``) of the files that each command wrote there. Only
these are replaced or removed when the command is run again. The first version kept no record: its outputs are
known by the JSON file that describes them (:class:`Older`). One process at a time writes to a folder
(:func:`claimed`).
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.config import completed, to_yaml
from revelio.files import (
    check_folder,
    check_place,
    check_ways,
    make_folder,
    names_in,
    write_folder,
    write_whole,
)
from revelio.lock import is_mine, take_lock
from revelio.run_settings import difference
from revelio.trust import file_in, path_in, printable, read_object

RECORD = ".revelio-files.json"


@dataclass(frozen=True)
class Older:
    """How an output of the first version, which kept no record, is known.

    Attributes:
        description: its JSON file.
        ours: whether the object in that file is such a description.
        names: the files of the output, given that object.
    """

    description: str
    ours: Callable[[dict[str, Any]], bool]
    names: Callable[[dict[str, Any]], Collection[str]]

    def files(self, path: Path) -> list[str]:
        """The files in ``path`` that the first version wrote; none where the description is no such."""
        try:
            found = read_object(path / self.description)
            if (path / "manifest.json").exists() or not self.ours(found):
                return []
        except (ValueError, KeyError, TypeError):
            return []
        return [name for name in self.names(found) if (path / name).is_file()]


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Have the output folder ``path`` to oneself; it is made, and gone again where nothing was written.

    Raises:
        ValueError: another process writes there (the message names it), or it can't be written.
    """
    check_folder(path)
    if path.is_dir() and is_mine(path):
        yield
        return
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    lock = take_lock(path)
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # a folder that is not empty stays
            for folder in made:
                folder.rmdir()


def replace_files(
    path: Path,
    maker: str,
    write: Callable[[Path], Any],
    needed: int | None = None,
    older: Older | None = None,
) -> None:
    """Write an output folder; of an earlier one, only the files that its record lists are replaced.

    Args:
        path: the folder; other files in it stay as they are.
        maker: which command's output it is: a folder may hold those of several.
        write: gets an empty folder.
        needed: bytes that it takes, where that is known.
        older: how an output of the first version is known.

    Raises:
        ValueError: a file that no record lists is in the way of a name, or another process writes there.
        OSError: it can't be written.
    """
    with claimed(path):
        _replace_files(path, maker, write, needed, older)


def _replace_files(
    path: Path, maker: str, write: Callable[[Path], Any], needed: int | None, older: Older | None
) -> None:
    record = read_record(path)
    earlier = _earlier(path, maker, older)

    def fill(folder: Path) -> None:
        write(folder)
        names = names_in(folder)
        check_ways(path, names, earlier)
        # First, so that a stop in the middle leaves no file that nobody owns.
        _write_record(path, record | {maker: sorted({*earlier, *names})})

    names = write_folder(path, fill, owned=earlier, needed=needed)
    _write_record(path, record | {maker: sorted(names)})


def _earlier(path: Path, maker: str, older: Older | None) -> list[str]:
    """The files of the maker's earlier output in ``path``."""
    record = read_record(path)
    if maker in record or older is None:
        return record.get(maker, [])
    return older.files(path)


def check_replaceable(
    path: Path, maker: str, names: Sequence[str], older: Older | None = None
) -> None:
    """See before the work whether :func:`replace_files` may write ``names`` into ``path``.

    Raises:
        ValueError: a file stands at ``path``, it can't be written, or one of the names is taken.
    """
    check_folder(path)
    check_ways(path, names, _earlier(path, maker, older))


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


def check_same_settings(path: Path, config: Any) -> None:
    """See that an earlier result, which is about to be replaced, was made with the same settings.

    Args:
        path: its JSON file, where there is one, which holds the settings as `config`, or does not say.
        config: the settings of the new result; its `out` is where both go.

    Raises:
        ValueError: it was made with others; the first is named.
    """
    if not path.is_file() or (said := read_object(path).get("config")) is None:
        return
    earlier = json.dumps(said, ensure_ascii=False)
    # A setting that the earlier version did not know had the value that is the default now.
    with suppress(ValueError):
        earlier = completed(config)(earlier)
    if (said := difference(earlier, to_yaml(config))) is not None:
        raise ValueError(
            f"{printable(config.out)} holds a result of {said}: give another place to write to, or remove "
            "it first"
        )
