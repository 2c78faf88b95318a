"""Which process wrote something, whether it still runs, and where its user keeps what can be made again."""

import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


def machine() -> str:
    """Where process ids mean the same: the host, its last boot, and the container's own ids."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def alive(pid: Any, started: Any) -> bool:
    """Whether the process that had this id, and began then, still runs."""
    if type(pid) is not int or pid < 1:
        return False
    now = start_of(pid)
    return runs(pid) if now is None else now == started


def runs(pid: int) -> bool:
    """Whether a process of this machine has this id now."""
    if Path("/proc/self/stat").exists():
        return start_of(pid) is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def start_of(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine's boot; None: it is not running, or unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name, in brackets, may hold anything; the state and the rest stand behind it.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def user_cache() -> Path:
    """Revelio's folder for what can be made again: in ``$XDG_CACHE_HOME``, ``~/.cache``, or temporary files.

    The last is for users without a home (as in containers), by their id; it must be theirs alone.

    Raises:
        OSError: there is no home, and the temporary folder belongs to somebody else.
    """
    bases = [Path(os.environ.get("XDG_CACHE_HOME", ""))]
    with suppress(RuntimeError):  # no HOME, and no entry for this user
        bases.append(Path.home() / ".cache")
    for base in bases:
        place = next(path for path in (base, *base.parents) if os.path.lexists(path))
        if base.is_absolute() and place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            return base / "revelio"
    own = Path(tempfile.gettempdir()) / f"revelio-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    about = own.lstat()
    if own.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise PermissionError(f"{own} is not this user's alone: set XDG_CACHE_HOME to a folder")
    return own
