"""Kills, crash points, full disks and twins: what a stop leaves, and what the next run makes of it."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from campaign.sandbox import CRASHED, TRACEBACK, Limits, finish, run, start
from campaign.world import World, call
from cli_helpers import WRITERS
from files_helpers import before_operations, results

from revelio.files import is_partial

# So many of its short steps take a moment in which it can be killed.
LONGER = {"train-ksae": ("--steps", 20), "train-diffc": ("--epochs", 3)}


@dataclass
class Stops:
    """What the stops of one command came to.

    Attributes:
        stops: how many there were.
        same: after how many the next run gave the bytes of one that was never stopped.
        seconds: of the uninterrupted run.
        every: crash points: one in so many file operations.
        notes: what was not as it should be.
    """

    stops: int = 0
    same: int = 0
    seconds: float = 0.0
    every: int = 1
    notes: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: object, faults: list[str]) -> None:
        """Count one stop."""
        self.stops += 1
        self.same += not faults
        if faults:
            self.notes.append({"stop": str(number), "faults": faults})


class Bench:
    """One command: a run that nothing stops, and folders to stop others in."""

    def __init__(self, world: World, name: str, kind: str, *more: object) -> None:
        self.world, self.name, self.more, self.writer = world, name, more, WRITERS[name]
        self.root = world.root / "cases" / f"{kind}-{name.replace(' ', '-')}"
        self.root.mkdir()
        whole = self.place("whole")
        outcome = run(self.action(whole), self.root, limits=Limits(120))
        if outcome.status:
            raise RuntimeError(f"{name} fails without a stop: {outcome.err}")
        self.seconds = outcome.wall
        self.expected = comparable(whole)
        self.size = sum(len(path.read_bytes()) for path in files_below(whole))

    def place(self, label: object) -> Path:
        """Where a run writes."""
        return self.root / f"{label}" / self.writer.place

    def action(self, out: Path, resume: bool = False) -> Callable[[], None]:
        """The command, begun or given again."""
        again = ["--resume"] if resume and self.writer.resumes else []
        return call(self.world.words(self.name, out, *self.more, *again))

    def stopped(self, out: Path, **how: Any) -> Any:
        """Begin or go on with a run that ``how`` stops."""
        out.parent.mkdir(exist_ok=True)
        return run(self.action(out, resume=True), self.root, **how)

    def after(self, out: Path) -> list[str]:
        """What is wrong once the command is given again after a stop."""
        outcome = run(self.action(out, resume=True), self.root, limits=Limits(120))
        # What is finished already may be refused, and is compared like all others.
        if outcome.status != 0 and not (self.writer.once and out.exists() and outcome.status == 2):
            return [f"status {outcome.status}, signal {outcome.signal}: {outcome.err[-600:]}"]
        found = comparable(out)
        names = sorted(
            k for k in found.keys() | self.expected.keys() if found.get(k) != self.expected.get(k)
        )
        left = [path.name for path in out.parent.rglob("*") if is_partial(path.name)]
        faults = [f"differs: {names[:5]}"] if names else []
        return faults + ([f"left: {left[:5]}"] if left else [])

    def clear(self, out: Path) -> None:
        """Remove a run's folder."""
        shutil.rmtree(out.parent, ignore_errors=True)


def files_below(out: Path) -> list[Path]:
    """The files of a result."""
    return [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]


def comparable(out: Path) -> dict[str, Any]:
    """A result without what differs between two runs: times, and reports that show them."""
    if out.is_file():
        return {name: value for name, value in results(out.parent).items() if name == out.name}
    found = results(out)
    timed = ("report.html", "report.json", "manifest.json") if (out / "stages").exists() else ()
    return {name: value for name, value in found.items() if name not in timed and name != ".lock"}


def kills(world: World, name: str, *, counts: dict[str, int], seed: int) -> Stops:
    """SIGKILL at random moments, one to three in a row, then the command again."""
    rng = Random(f"{seed} {name} kills")
    bench = Bench(world, name, "kill", *LONGER.get(name, ()))
    found = Stops(seconds=bench.seconds)
    for number in range(counts[name]):
        out = bench.place(number)
        faults = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            outcome = bench.stopped(out, kill_after=rng.uniform(0, bench.seconds * 1.05))
            if outcome.signal is None and outcome.status:
                faults.append(f"status {outcome.status}: {outcome.err[-600:]}")
        found.add(number, faults + bench.after(out))
        bench.clear(out)
    return found


def crash_points(world: World, name: str, *, steps: dict[str, int], most: int = 5000) -> Stops:
    """Stop the process before its file operation 1, 1 + step, ..., then give the command again."""
    bench = Bench(world, name, "crash")
    found = Stops(seconds=bench.seconds, every=steps[name])
    for number in range(1, most, steps[name]):
        out = bench.place(number)
        out.parent.mkdir()
        outcome = run(crashing(bench.action(out), number), bench.root, limits=Limits(120))
        if outcome.status == 0:
            bench.clear(out)
            break
        faults = (
            [] if outcome.status == CRASHED else [f"status {outcome.status}: {outcome.err[-600:]}"]
        )
        found.add(number, faults + bench.after(out))
        bench.clear(out)
    return found


def crashing(action: Callable[[], None], number: int) -> Callable[[], None]:
    """The action in a process that ends at once before its file operation ``number``."""

    def crash() -> None:
        done = 0

        def stop() -> None:
            nonlocal done
            done += 1
            if done >= number:
                os._exit(CRASHED)

        with pytest.MonkeyPatch.context() as patch:
            before_operations(stop, patch)
            action()

    return crash


def full_disks(world: World, name: str, *, count: int) -> Stops | None:
    """The output on a small tmpfs, then room and the command again; None where nothing may be mounted."""
    bench = Bench(world, name, "disk")
    found = Stops(seconds=bench.seconds)
    pages = max(4, 2 * bench.size // 4096)
    for number in range(count):
        out = bench.place(number)
        out.parent.mkdir()
        size = 4096 * (1 + pages * number // count)
        if mount(out.parent, size):
            return None
        try:
            outcome = bench.stopped(out)
            full = outcome.status == 2 and "the disk is full: no room for" in outcome.err
            if outcome.status == 0:
                continue
            faults = (
                [] if full else [f"{size} bytes, status {outcome.status}: {outcome.err[-600:]}"]
            )
            mount(out.parent, 1 << 28, "remount")
            found.add(f"{size} bytes", faults + bench.after(out))
        finally:
            subprocess.run(["umount", str(out.parent)], check=True)
            bench.clear(out)
    return found


def mount(place: Path, size: int, how: str = "rw") -> int:
    """Put a file system of ``size`` bytes there, or resize it; gives the status."""
    words = ["mount", "-t", "tmpfs", "-o", f"{how},size={size}", "tmpfs", str(place)]
    return subprocess.run(words, capture_output=True, check=False).returncode


def twins(world: World, name: str, *, count: int, seed: int) -> Stops:
    """Two processes in one folder, one a moment after the other; then the command once more."""
    rng = Random(f"{seed} {name} twins")
    bench = Bench(world, name, "twins", *LONGER.get(name, ()))
    found = Stops(seconds=bench.seconds)
    other = bench.root.with_name(f"{bench.root.name}-other")
    other.mkdir()
    for number in range(count):
        out = bench.place(number)
        out.parent.mkdir()
        first = start(bench.action(out, resume=True), other)
        time.sleep(rng.uniform(0, bench.seconds / 2))
        second = bench.stopped(out)
        ended, said = finish(first, other, 120)
        faults = []
        for status, err in ((ended, said), (second.status, second.err)):
            if status == TRACEBACK or status not in (0, 2):
                faults.append(f"status {status}: {err[-600:]}")
        if 0 not in (ended, second.status) and bench.writer.resumes:
            faults.append(f"neither did the work: {said[-200:]} {second.err[-200:]}")
        found.add(number, faults + bench.after(out))
        bench.clear(out)
    return found
