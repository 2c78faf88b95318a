"""What the commands do, callable from Python: each returns what it made and prints nothing.

How far it is goes to one callable, which gets a :class:`Progress` now and then.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a pipeline is, or something that a person should know.

    Attributes:
        message: lines of text; empty where only the numbers have changed.
        done: units of work done.
        total: units of work in all; 0: not known, or nothing is counted yet.
        unit: what they are.
        numbers: the latest measurements, as texts by name.
        stage: what is being done, where a pipeline does several things.
    """

    message: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    numbers: tuple[tuple[str, str], ...] = ()
    stage: str = ""


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Tell nobody."""
