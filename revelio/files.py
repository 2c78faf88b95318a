"""Files are written whole or not at all, and nothing that Revelio did not write is replaced or removed.

    content -> .NAME.PID-TOKEN.partial beside the place -> flushed to the disk -> renamed -> folder flushed

A power cut leaves the old file or the new one. The umask decides the mode. Where a full disk stops it, one
line names the file, what it needs, and what is free.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from revelio.disk import FULL, DiskFull, existing, full_disk_named
from revelio.process import machine, runs
from revelio.trust import path_in, printable

# Folders that this process has looked through for what killed writers left.
_swept: set[Path] = set()
_PARTIAL = re.compile(r"\..+\.(\d+)(-[0-9a-f]{8,24})?\.partial")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` to the file ``path`` so that a reader sees all of it or none of it.

    Raises:
        ValueError: a folder or something else that is no file stands at ``path``.
        OSError: it can't be written; :class:`DiskFull` where there is no room.
    """
    # A name that is not UTF-8 becomes an escape, which JSON reads back as it was.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    check_place(path)
    _ready(path.parent)
    temporary = partial_path(path)
    with full_disk_named(path, len(data)), _removed(temporary):
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    sync_folder(path.parent)


def write_whole_by(path: Path, write: Callable[[Path], Any], needed: int | None = None) -> None:
    """Let ``write`` make a file in a folder of its own, then move it to ``path``.

    Args:
        path: the file.
        write: gets the path to write to.
        needed: bytes that it takes, where that is known.

    Raises:
        ValueError: a folder stands at ``path``.
        OSError: it can't be written; :class:`DiskFull` where there is no room.
    """
    check_place(path)
    with _staging(path, needed) as folder:
        write(folder / path.name)
        settle(folder)
        os.replace(folder / path.name, path)
    sync_folder(path.parent)


def write_folder(
    path: Path,
    write: Callable[[Path], Any],
    *,
    owned: Collection[str] | None = None,
    needed: int | None = None,
) -> list[str]:
    """Let ``write`` fill a new folder, then move it to ``path``, or its files one by one into what is there.

    An empty folder that is this user's gives way to the new one, which gets its mode and group: a stop leaves
    it empty or whole.

    Args:
        path: the folder.
        write: gets an empty folder.
        owned: the files at ``path`` that are this writer's: they may be replaced, and those that are not
            written again are removed. None: every name that is written is its own, nothing is removed.
        needed: bytes that it takes, where that is known.

    Returns:
        The names of the files written, relative to the folder.

    Raises:
        ValueError: a file stands at ``path``, or something that is not owned in the way of a name.
        OSError: it can't be written; :class:`DiskFull` where there is no room.
    """
    check_folder(path)
    with _staging(path, needed) as folder:
        write(folder)
        names = settle(folder)
        check_ways(path, names, owned)
        if not path.exists():
            os.rename(folder, path)
        elif folder.parent == path or not _gives_way(path, folder):
            _move_into(path, folder, names)
            for name in sorted(set(owned or ()) - set(names)):
                _remove(path, name)
            sync_folder(path)
    sync_folder(path.parent)
    return names


def _move_into(path: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        make_folder((path / name).parent)
        os.replace(folder / name, path / name)
    for inner in {(path / name).parent for name in names} - {path}:
        sync_folder(inner)


def _may_give_way(path: Path) -> bool:
    """Whether ``path`` is an empty folder of this user's, to which files can be moved from beside it."""
    if path.is_symlink() or not path.is_dir() or any(path.iterdir()):
        return False
    if path.stat().st_uid != os.getuid():
        return False
    beside = partial_path(path)
    inside = path / beside.name
    try:  # no, where something is mounted
        beside.open("xb").close()
        os.rename(beside, inside)
    except OSError:
        return False
    finally:
        for probe in (beside, inside):
            probe.unlink(missing_ok=True)
    return True


def _gives_way(path: Path, folder: Path) -> bool:
    """Put ``folder`` in the place of the empty ``path``; False: something came into it meanwhile."""
    about = path.stat()
    with suppress(OSError):  # a group that this user is not in
        os.chown(folder, -1, about.st_gid)
    folder.chmod(stat.S_IMODE(about.st_mode))
    with suppress(OSError):
        os.rename(folder, path)
        return True
    return False


def check_folder(path: Path) -> None:
    """See whether a folder can be made and written at ``path``, by trying where it would be.

    What writers that were killed left half-written there is removed.

    Raises:
        ValueError: a file stands there or above it, or it can't be written.
    """
    place = existing(path)
    if not place.is_dir():
        raise ValueError(f"{printable(place)} is a file, not a folder: choose another place")
    try:
        probe = partial_path(place / "probe")
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(path, None) from error
        raise ValueError(f"{printable(path)} can't be written: {error.strerror}") from error
    for folder in (path, path.parent, place):
        with suppress(OSError):  # one that this user may not list, or another process that sweeps
            sweep(folder, dead=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name on the same disk; a copy of its own where the file system has no such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove_files(folder: Path, names: Callable[[str], object]) -> None:
    """Remove the files directly in ``folder`` that ``names`` takes for ours, then the folder if it is empty.

    A link is removed itself, never what it points to.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if names(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
        sync_folder(folder.parent)


def sweep(folder: Path, *, dead: bool = False) -> None:
    """Remove what writers that were killed left half-written in ``folder``.

    Args:
        folder: of a run that this process has locked.
        dead: others may be at work there: only what a process of this machine left that has ended.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if not is_partial(path.name) or (dead and not _is_dead(path.name)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=dead)
        else:
            path.unlink(missing_ok=True)


def _is_dead(name: str) -> bool:
    found = _PARTIAL.fullmatch(name)
    if found is None or not (found[2] or "").startswith(f"-{_machine_id()}"):
        return False
    return not runs(int(found[1]))


@cache
def _machine_id() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


def partial_path(path: Path) -> Path:
    """A name beside ``path`` for what is not whole yet, which says whose it is; :func:`sweep` knows it."""
    token = f"{_machine_id()}{secrets.token_hex(4)}"
    return path.with_name(f".{path.name[:200]}.{os.getpid()}-{token}.partial")


def is_partial(name: str) -> bool:
    """Whether a name is one that :func:`partial_path` gives."""
    return _PARTIAL.fullmatch(name) is not None


def _ready(folder: Path) -> None:
    """Make a folder, and the first time that this process writes there remove what killed writers left."""
    make_folder(folder)
    place = Path(os.path.abspath(folder))
    if place not in _swept:
        with suppress(OSError):  # one that this user may not list, or another process that sweeps
            sweep(place, dead=True)
        _swept.add(place)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, flushed to the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with full_disk_named(path):
        path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, on systems and file systems that can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        with full_disk_named(path):
            os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES):
            raise
    finally:
        os.close(handle)


@contextmanager
def _staging(path: Path, needed: int | None) -> Iterator[Path]:
    """An empty folder on the same disk; it is gone afterwards, with what is still in it."""
    _ready(path.parent)
    # Inside a folder that is there: above it this user may not write.
    beside = path / "new" if path.is_dir() and not _may_give_way(path) else path
    folder = partial_path(beside)
    with full_disk_named(path, needed):
        if needed is not None and shutil.disk_usage(path.parent).free < needed:
            raise DiskFull(path, needed)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _removed(temporary: Path) -> Iterator[None]:
    try:
        yield
    finally:
        temporary.unlink(missing_ok=True)


def settle(folder: Path) -> list[str]:
    """Give all files the mode that the umask decides, and flush them; gives their names."""
    names = names_in(folder)
    # Some writers make private files; a new folder's mode says what the umask leaves.
    mode = folder.stat().st_mode & 0o666
    for name in names:
        handle = os.open(folder / name, os.O_RDONLY)
        try:
            os.fchmod(handle, mode)
            os.fsync(handle)
        finally:
            os.close(handle)
    for inner in {(folder / name).parent for name in names}:
        sync_folder(inner)
    return names


def names_in(folder: Path) -> list[str]:
    """The files below a folder, relative to it, but for what is half-written."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name.as_posix() for name in found if not is_partial(name.parts[0]))


def check_place(path: Path) -> None:
    """Raise ValueError where a folder, a pipe or a device stands in a file's place."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise ValueError(f"{printable(path)} is {what}: choose the name of a file")


def check_ways(path: Path, names: Sequence[str], owned: Collection[str] | None) -> None:
    """Refuse names that something else takes, or that a link would lead out of the folder."""
    free = None if owned is None else set(owned)
    for name in names:
        place = path / name
        taken = os.path.lexists(place)
        if taken and ((free is not None and name not in free) or place.is_dir()):
            raise ValueError(
                f"{printable(place)} is in the way and was not written by this command: "
                "move it, or choose another folder"
            )
        for above in place.relative_to(path).parents[:-1]:
            inner = path / above
            if inner.is_symlink() or (inner.exists() and not inner.is_dir()):
                raise ValueError(f"{printable(inner)} is in the way: choose another folder")


def _remove(path: Path, name: str) -> None:
    """Remove an earlier output's file, and the folders that it leaves empty."""
    place = path_in(path, name)
    place.unlink(missing_ok=True)
    for inner in place.relative_to(path).parents[:-1]:
        if (path / inner).is_dir() and not any((path / inner).iterdir()):
            (path / inner).rmdir()
