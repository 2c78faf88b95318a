"""What this machine has: memory that can still be taken, and room on a disk; sizes and times for people."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# What PyTorch says, in small letters, of a size that memory or a number can't hold.
_TOO_LARGE = ("out of memory", "allocate memory", "not enough memory", "overflow", "invalid size")
# Flags that decide how much a command holds at once, and those of number formats, by the end of their names.
_SMALLER = ("batch-size", "pass-size", "images-at-once", "image-size")
_FORMAT = "dtype"


def available_memory() -> int | None:
    """Bytes that a process can still take: what the system has free, at most what its container may use.

    None where the system does not say.
    """
    found = [left for left in (_system_memory(), _container_memory()) if left is not None]
    return min(found) if found else None


def _system_memory() -> int | None:
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _container_memory() -> int | None:
    """What is left of a container's limit; file caches count as free."""
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        counted = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = sum(int(line.split()[1]) for line in counted if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return None
    return max(0, limit - used + cached)


def free_disk(path: Path) -> int | None:
    """Bytes free where ``path`` is or would be made; None where the system does not say."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as people say them."""
    if seconds < 0.95:
        return f"{seconds:.1g} s" if seconds >= 0.05 else "under 0.1 s"
    if seconds < 89.5:
        return f"{seconds:.0f} s"
    if seconds < 597:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 60:.0f} min" if seconds < 5370 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Bytes as people say them."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.3g} {unit}"
    return f"{count / 1e3:.1f} kB"


def beyond_memory(error: BaseException, flags: Iterable[str] = ()) -> str | None:
    """One line where a size went beyond memory, or beyond what a size can be: which, and which flags help.

    Args:
        error: what was raised.
        flags: of the command that it was raised in.

    Returns:
        None where the error is of another kind.
    """
    told = any(word in str(error).lower() for word in _TOO_LARGE)
    if not told and not isinstance(error, MemoryError | OverflowError):
        return None
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    # PyTorch goes on with what its allocator holds, and how to set that.
    said = said.partition(" Including non-PyTorch memory")[0].rstrip(".")
    ends = [(flag, flag.strip("-").rpartition(".")[2]) for flag in flags]
    lower = [flag for flag, end in ends if end in _SMALLER]
    helps = [f"lower {' or '.join(lower)}"] * bool(lower)
    helps += [f"set {flag} bfloat16" for flag, end in ends if end == _FORMAT]
    return f"this does not fit: {said}; {', or '.join(helps) or 'choose smaller sizes or batches'}"
