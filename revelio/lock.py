"""One process at a time in a run folder: a lock file that says who, and that outlives nobody.

``.lock`` is made by a hard link, which is atomic on network file systems too, where advisory locks often are
not. It names the process, its start (so that a reused id is not taken for it) and its machine. On the same
machine a dead process's lock is taken over at once. Of another machine only signs of life can be seen: the
holder touches the file every few seconds, and a lock that was not touched for two minutes, by the file
system's own clock, is free.
"""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from revelio.disk import DiskFull, full_disk_named
from revelio.files import partial_path, write_whole
from revelio.process import alive, machine, start_of
from revelio.trust import printable, read_object

NAME = ".lock"
BEAT = 10.0  # seconds between signs of life
STALE = 120.0  # seconds without one until another machine's lock is free


class Lock:
    """A lock that this process holds, given back at the latest when nothing refers to it any more."""

    def __init__(self, path: Path, owner: dict[str, Any]) -> None:
        self.path, self.owner = path, owner
        ended = threading.Event()
        threading.Thread(target=_beat, args=(path, owner, ended), daemon=True).start()
        self.release = weakref.finalize(self, _release, path, owner, ended)


def _release(path: Path, owner: dict[str, Any], ended: threading.Event) -> None:
    ended.set()
    # A forked child has not taken it, and by now it may be another's.
    if owner["pid"] == os.getpid() and _read(path) == owner:
        path.unlink(missing_ok=True)


def _beat(path: Path, owner: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            # After a machine slept it may be another's, which must not outlive that one.
            if _read(path) == owner:
                os.utime(path)


def take_lock(folder: Path) -> Lock:
    """Take the lock of an existing folder; a dead process's is taken over, and this process's own kept.

    Raises:
        ValueError: another process is at work there; the message names it.
        OSError: the folder can't be written.
    """
    path, owner = folder / NAME, _self()
    for _ in range(10):
        with full_disk_named(path):
            made = _create(path, owner)
        if made:
            return Lock(path, owner)
        found = _read(path)
        if _same_process(found, owner):
            write_whole(path, json.dumps(owner) + "\n")
            return Lock(path, owner)
        _check_dead(path, found)
        if _take_over(path, found, owner):
            return Lock(path, owner)
    raise ValueError(f"{printable(folder)} is being opened by other processes: try again")


def check_free(folder: Path) -> None:
    """See whether :func:`take_lock` would get the lock of a folder, which need not exist; takes nothing.

    Raises:
        ValueError: another process is at work there; the message names it.
    """
    found = _read(folder / NAME)
    if found and not _same_process(found, _self()):
        _check_dead(folder / NAME, found)


def is_mine(folder: Path) -> bool:
    """Whether this process holds the lock of a folder."""
    return _same_process(_read(folder / NAME), _self())


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Make the lock with its content in one step; False where there is one."""
    temporary = partial_path(path)
    temporary.write_text(json.dumps(owner) + "\n")
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links: exclusive creation is atomic, the content comes a moment later.
        try:
            with path.open("x") as file:
                file.write(json.dumps(owner) + "\n")
            return True
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)


def _take_over(path: Path, dead: dict[str, Any], owner: dict[str, Any]) -> bool:
    """Put a lock in the place of a dead process's, which is never free in between; False: look again.

    Those that try take turns by an advisory lock on the dead one's file.
    """
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            here = os.path.samestat(os.fstat(file.fileno()), path.stat())
            if not here or _read(path) != dead:
                return False  # another process was faster
            write_whole(path, json.dumps(owner) + "\n")
            return True
    except DiskFull:
        raise
    except OSError:  # gone meanwhile, another user's file, or a file system without advisory locks
        _move_away(path, dead)
        return False


def _move_away(path: Path, dead: dict[str, Any]) -> None:
    """Remove a dead process's lock; of several that try, one moves it away, and it must still be that one."""
    aside = partial_path(path)
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != dead:
            # Another process took over between our look and our move: it gets its lock back.
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _check_dead(path: Path, found: dict[str, Any]) -> None:
    """Raise ValueError where the holder lives, or may live."""
    if not found and path.is_file() and path.stat().st_size:
        raise ValueError(f"{printable(path)} is not Revelio's: choose another folder")
    here = found.get("machine") == machine()
    if here and not alive(found.get("pid"), found.get("started")):
        return
    quiet = _quiet(path)
    if not here and quiet > STALE:
        return
    who = f"process {printable(found.get('pid', '?'))} on {printable(found.get('host', '?'))}"
    since = f", last sign of life {quiet:.0f} s ago" if not here else ""
    later = "" if here else f" (a lock without one for {STALE:.0f} s is free)"
    raise ValueError(
        f"{printable(path.parent)} is in use by {who}{since}: wait until it has ended{later}, "
        "or choose another folder"
    )


def _quiet(path: Path) -> float:
    """Seconds since the lock was touched, both times by the clock of its file system."""
    probe = partial_path(path)
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """What a lock says; nothing where it is gone or can't be read."""
    try:
        return read_object(path, limit=4096)
    except ValueError:
        return {}


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "started": start_of(pid),
        "host": socket.gethostname(),
        "machine": machine(),
        "token": secrets.token_hex(8),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _same_process(found: dict[str, Any], owner: dict[str, Any]) -> bool:
    names = ("pid", "started", "machine")
    return "token" in found and all(found.get(name) == owner[name] for name in names)
