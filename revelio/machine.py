"""What this machine has: memory that can still be taken, and room on a disk."""

import os
import shutil
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


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
