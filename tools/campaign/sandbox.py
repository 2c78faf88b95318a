"""One command in a process of its own, watched: what it touches, runs, takes, prints, and how it ends.

The process is forked from one that has imported everything, so that a case takes as long as its own work.
An audit hook reports what Python does from then on: files written outside the case's folder, anything of
the folder ``outside`` opened at all, programs started, network addresses asked for. Native code has no such
events: the files outside are compared besides.
"""

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 1 << 30
TRACEBACK = 70  # the exit status of a case that ended in one
CRASHED = 71  # that of a case stopped before a file operation

_CHANGES = {
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.mkdir": (0, 2),
    "os.truncate": (0, None),
    "os.chmod": (0, 2),
    "os.rename": (0, 2),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
}
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.startfile")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")


@dataclass(frozen=True)
class Limits:
    """When a case is called a hang, or a glutton.

    Attributes:
        seconds: of its own time; ten times as long on the clock, where it waits or others are at work.
        memory: bytes beyond what it began with.
    """

    seconds: float = 30.0
    memory: int = GIB


@dataclass
class Outcome:
    """How a case ended.

    Attributes:
        status: its exit status; None where a signal ended it.
        signal: that signal.
        seconds: of its own time.
        wall: on the clock.
        hung: whether it was ended for taking too long.
        memory: bytes taken beyond what it began with, at most.
        out: what it printed.
        err: what it said on stderr.
        touched: what it did outside of its folder.
        ran: programs it started.
        asked: network addresses it asked for.
    """

    status: int | None
    signal: int | None
    seconds: float
    memory: int
    out: str
    err: str
    wall: float = 0.0
    hung: bool = False
    touched: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


def run(
    action: Callable[[], object],
    folder: Path,
    *,
    writable: tuple[Path, ...] = (),
    outside: Path | None = None,
    limits: Limits | None = None,
    kill_after: float | None = None,
) -> Outcome:
    """Do ``action`` in a forked process whose working folder is ``folder``.

    Args:
        action: what to do; SystemExit gives the status.
        folder: its working folder, which it may write.
        writable: further folders that it may write.
        outside: a folder that it may not even read.
        limits: after these seconds it is killed.
        kill_after: seconds after which it gets SIGKILL.
    """
    limits = limits or Limits()
    log = folder.with_name(f"{folder.name}.log")
    log.mkdir(exist_ok=True)
    sys.stdout.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(action, folder, log, (folder, *writable), outside)
    end = 10 * limits.seconds if kill_after is None else kill_after
    status, usage = _wait(pid, began + end, limits.seconds)
    events = [line.partition(" ") for line in _text(log / "events").splitlines()]
    base = next((int(what) for kind, _, what in events if kind == "base"), 0)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    outcome = Outcome(
        status=None if killed else os.WEXITSTATUS(status),
        signal=killed,
        seconds=usage.ru_utime + usage.ru_stime,
        wall=time.monotonic() - began,
        hung=killed == signal.SIGKILL and kill_after is None,
        memory=max(0, usage.ru_maxrss * 1024 - base),
        out=_text(log / "out"),
        err=_text(log / "err"),
    )
    for kind, _, what in events:
        if kind != "base":
            getattr(outcome, kind).append(what)
    return outcome


def start(action: Callable[[], object], folder: Path) -> int:
    """Begin ``action`` in a forked process and give its id; :func:`finish` waits for it."""
    log = folder.with_name(f"{folder.name}.log")
    log.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        _child(action, folder, log, (), None, watch=False)
    return pid


def finish(pid: int, folder: Path, seconds: float) -> tuple[int | None, str]:
    """The exit status (None: a signal) and stderr of what :func:`start` began."""
    status, _ = _wait(pid, time.monotonic() + 10 * seconds, seconds)
    err = _text(folder.with_name(f"{folder.name}.log") / "err")
    return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else None), err


def _own_time(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(map(int, found[11:13])) / os.sysconf("SC_CLK_TCK")


def _wait(pid: int, until: float, own: float) -> tuple[int, Any]:
    """Wait for a process; it is killed at a time on the clock, or once it has taken so much of its own."""
    pause = 0.0005
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage
        left = until - time.monotonic()
        if left <= 0 or _own_time(pid) > own:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            return status, usage
        time.sleep(min(pause, left))
        pause = min(0.01, pause * 1.5)


def _child(
    action: Callable[[], object],
    folder: Path,
    log: Path,
    writable: tuple[Path, ...],
    outside: Path | None,
    watch: bool = True,
) -> None:
    """Never returns."""
    status = TRACEBACK
    try:
        for number, name in ((1, "out"), (2, "err")):
            handle = os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
        # What pytest or a notebook may have put in their place goes nowhere.
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        events = os.open(log / "events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.chdir(folder)
        os.write(events, f"base {_resident()}\n".encode())
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 6 * GIB, size + 6 * GIB))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if watch:
            sys.addaudithook(_hook(events, writable, outside))
        action()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 0 if not stopped.code else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _hook(
    events: int, writable: tuple[Path, ...], outside: Path | None
) -> Callable[[str, tuple[Any, ...]], None]:
    allowed = tuple(f"{os.path.realpath(place)}/" for place in writable)
    closed = f"{os.path.realpath(outside)}/" if outside else None

    def say(kind: str, what: object) -> None:
        line = f"{kind} {what!r}\n".encode(errors="backslashreplace")
        os.write(events, line)

    def look(event: str, path: Any, folder: Any, writes: bool) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor that is open already
        name = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
        # Removing or renaming a link is about the link itself, opening it is not.
        if event == "open":
            real = os.path.realpath(name)
        else:
            above, last = os.path.split(os.path.abspath(name))
            real = os.path.join(os.path.realpath(above), last)
        if (closed and real.startswith(closed)) or (
            writes and real != os.devnull and not f"{real}/".startswith(allowed)
        ):
            say("touched", (event, real))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(set(mode or "") & set("wax+")) or bool(
                (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            look(event, path, None, writes)
        elif event in _CHANGES:
            where, at = _CHANGES[event]
            look(event, arguments[where], arguments[at] if at is not None else None, True)
            if event == "os.rename":
                look(event, arguments[1], arguments[3], True)
        elif event in _RUNS:
            say("ran", (event, arguments[:2]))
        elif event in _NETWORK:
            say("asked", (event, arguments[1:] if event == "socket.connect" else arguments))

    return hook


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
