"""A full disk, said in one line: which file, what it needs, and what is free."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from revelio.trust import printable

# What the system says where there is no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(OSError):
    """A file does not fit; the message is one line with the file, what it needs, and what is free."""

    def __init__(self, path: Path, needed: int | None) -> None:
        free = shutil.disk_usage(existing(path)).free
        needs = "" if needed is None else f"it needs {_size(needed)}, "
        super().__init__(
            errno.ENOSPC,
            f"the disk is full: no room for {printable(path)} ({needs}{_size(free)} free); "
            "make room, then resume or run it again",
        )

    def __str__(self) -> str:
        """The line alone, without the error's number."""
        return str(self.args[1])


@contextmanager
def full_disk_named(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk, as a library or the system says it, into one line about ``path``.

    Raises:
        DiskFull: there was no room.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        # safetensors and torch have errors of their own kinds for it.
        full = getattr(error, "errno", None) in FULL or "No space left on device" in str(error)
        if not (full or _torn_archive(error, path)):
            raise
        raise DiskFull(path, needed) from error


def _torn_archive(error: Exception, path: Path) -> bool:
    """Whether torch could not write the end of its file, and there is no room: it does not say why."""
    torn = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return torn and shutil.disk_usage(existing(path)).free < 1 << 20


def reserve(path: Path, size: int) -> None:
    """Make ``path`` a file of ``size`` bytes that the disk holds, so that it can be mapped without a fault.

    Raises:
        DiskFull: there is no room.
    """
    with full_disk_named(path, size), path.open("ab") as file:
        file.truncate(size)
        if size > shutil.disk_usage(path.parent).free + path.stat().st_blocks * 512:
            raise DiskFull(path, size)
        if hasattr(os, "posix_fallocate") and size:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                # Some file systems cannot: the look at what is free must do.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    place = Path(os.path.abspath(path))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000  # pyright: ignore[reportAssignmentType]
    raise AssertionError
