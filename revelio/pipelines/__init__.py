"""What the commands do, callable from Python: each returns what it made and prints nothing.

How far it is goes to one callable, which gets a :class:`Progress` now and then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a pipeline is, or something that a person should know.

    Attributes:
        message: lines of text; empty where only the numbers have changed.
        done: units of work done.
        total: units of work in all; 0: not known, or nothing is counted yet.
        unit: what they are.
        title: what is counted, where a pipeline counts several things; "": the whole of it.
        numbers: the latest measurements, as texts by name.
    """

    message: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    numbers: tuple[tuple[str, str], ...] = ()
    title: str = ""


@dataclass(frozen=True)
class Made:
    """What a pipeline wrote: its JSON file, or a page beside that, and what the JSON file holds."""

    path: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class Reported:
    """A folder that a pipeline filled, and what the `report.json` in it holds."""

    path: Path
    report: dict[str, Any]


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Tell nobody."""


def counted(report: Report, title: str, total: int, unit: str) -> Callable[[int], None]:
    """A callable that is told how many more units are done, and reports how far that is."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(Progress(done=done, total=total, unit=unit, title=title))

    add(0)
    return add
