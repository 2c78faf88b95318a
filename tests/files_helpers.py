"""A process that is killed between two file operations, and folders compared byte for byte."""

import builtins
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = ("replace", "rename", "link", "unlink", "mkdir", "rmdir")
NOBODY = 2**22 + 1  # no process has so high an id
TIMES = {"seconds", "started", "ended", "seconds_a_picture", "time_ratio", "out"}
TIMES |= {"peak_memory_bytes", "loading_memory_bytes", "mtime_ns"}
SHOWN_TIMES = re.compile(rb"\d+\.\d+ s, x\d+\.\d+")


class Killed(BaseException):
    """What a kill looks like from within; from then on no file operation is done any more."""


def killed_at(number: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Do ``action`` up to its file operation ``number``; gives whether it got that far."""
    done = 0

    def stop() -> None:
        nonlocal done
        done += 1
        if done >= number:
            raise Killed

    with monkeypatch.context() as patch:
        before_operations(stop, patch)
        # A process that is killed gives no lock back.
        patch.setattr("revelio.lock._release", lambda path, owner, ended: ended.set())
        try:
            action()
        except Killed:
            return True
    return False


def before_operations(stop: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Let ``stop`` be called before every operation that changes a folder or opens a file to write."""

    def changed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            stop()
            return real(*arguments, **named)

        return call

    def opened(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if set(mode) & set("wax+") and str(file) != os.devnull:
                stop()
            return real(file, mode, *arguments, **named)

        return call

    for name in OPERATIONS:
        patch.setattr(os, name, changed(getattr(os, name)))
    patch.setattr(builtins, "open", opened(builtins.open))
    patch.setattr(io, "open", opened(io.open))


def bury(lock: Path) -> None:
    """Let a lock be that of a process whose id another process has now."""
    if lock.exists():
        owner = json.loads(lock.read_text())
        lock.write_text(json.dumps(owner | {"started": -1}))


def bury_partials(folder: Path) -> None:
    """Let what is half-written in and beside ``folder`` be that of a process which is no more."""
    found = [*folder.parent.glob(".*.partial"), *folder.rglob(".*.partial")]
    for path in sorted(found, key=lambda path: -len(path.parts)):
        path.rename(path.with_name(path.name.replace(f".{os.getpid()}-", f".{NOBODY}-")))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def results(folder: Path) -> dict[str, Any]:
    """Every file below ``folder``, but for the times that a run notes down, and where it is."""
    found: dict[str, Any] = contents(folder)
    for name, data in found.items():
        if name.endswith(".json"):
            found[name] = _timeless(json.loads(data))
        elif name.endswith(".jsonl"):
            found[name] = [_timeless(json.loads(line)) for line in data.splitlines()]
        elif name.endswith(".html"):
            found[name] = SHOWN_TIMES.sub(b"", data)
        elif name.endswith(".yaml"):
            lines = data.replace(os.fsencode(folder), b"").splitlines()
            found[name] = [line for line in lines if not line.startswith((b"out:", b"resume:"))]
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value
