"""Hostile inputs run and judged: what each kind of them came to, in counts."""

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from campaign import hostile, hostile_data, hostile_runs, hostile_told
from campaign.hostile import Case
from campaign.sandbox import TRACEBACK, Limits, Outcome, run
from campaign.world import World
from safetensors.torch import load_file

# How many of a thousand each kind gets.
KINDS: dict[str, tuple[Callable[..., Case], int]] = {
    "manifests of stores": (hostile.manifests, 130),
    "headers and bytes of shards": (hostile.shards, 90),
    "run folders": (hostile.runs, 90),
    "top images, galleries, records": (hostile.results, 90),
    "k-SAE folders": (hostile.ksaes, 90),
    "k-SAEs of other projects, .pt": (hostile.foreign_ksaes, 90),
    "Diff-C folders": (hostile.classifiers, 70),
    "LLaVA folders": (hostile.llavas, 60),
    "backbone folders": (hostile.models, 60),
    "folders of pictures": (hostile_data.pictures, 60),
    "parquet files": (hostile_data.parquets, 50),
    "data sets on disk": (hostile_data.datasets_on_disk, 20),
    "lists of known data sets": (hostile_data.lists, 20),
    "concepts and masks": (hostile_runs.concepts, 80),
    "tables of prompts": (hostile_runs.prompts, 60),
    "runs of zero-shot, advise, reproduce": (hostile_runs.runs, 80),
    "caches of replies": (hostile_runs.caches, 40),
    "names, measures, scores, galleries": (hostile_told.told, 60),
    "masks and captions": (hostile_told.pictures_told, 50),
    "benches and answers": (hostile_told.benches, 60),
    "judges' replies": (hostile_told.replies, 40),
    "projectors and runs of LLaVA": (hostile_told.projectors, 60),
    "requests to a gallery's server": (hostile_told.uploads, 30),
    "config files (YAML, JSON)": (hostile_data.configs, 80),
    "flags": (hostile_data.flags, 100),
}
FAULTS = (
    "code run",
    "outside",
    "different",
    "traceback",
    "exit",
    "hang",
    "memory",
    "network",
    "lines",
)


@dataclass
class Tally:
    """What a kind came to.

    Attributes:
        inputs: cases run.
        refused: those that ended with status 2.
        faults: cases by fault.
        seconds: the longest case.
        memory: bytes that the greediest took.
        notes: the first cases of each fault.
    """

    inputs: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    memory: int = 0
    notes: list[dict[str, Any]] = field(default_factory=list)


def attack(world: World, inputs: int, seed: int, tell: Callable[[str], None]) -> dict[str, Tally]:
    """Run about ``inputs`` cases, shared out over the kinds."""
    total = sum(share for _, share in KINDS.values())
    before = tree(world.outside)
    tallies = {}
    for name, (kind, share) in KINDS.items():
        tally = tallies[name] = Tally()
        for number in range(max(1, -(-inputs * share // total))):
            one_case(world, kind, f"{seed} {name} {number}", before, tally)
        faults = ", ".join(f"{fault} {n}" for fault, n in tally.faults.items()) or "no fault"
        tell(f"{name}: {tally.inputs} inputs, {tally.refused} refused, {faults}")
    return tallies


def one_case(
    world: World, kind: Callable[..., Case], key: str, before: dict[str, Any], tally: Tally
) -> None:
    """Make a case, run it, judge it, and clear it away."""
    folder = world.root / "cases" / re.sub(r"\W+", "-", key)
    folder.mkdir()
    case = kind(random.Random(key), world, folder)
    limits = Limits()
    outcome = run(
        case.action, folder, writable=(world.root / "cache",), outside=world.outside, limits=limits
    )
    found = judged(world, case, outcome, limits, before)
    tally.inputs += 1
    tally.refused += outcome.status == 2
    tally.seconds = max(tally.seconds, outcome.seconds)
    tally.memory = max(tally.memory, outcome.memory)
    tally.faults.update(found.keys())
    for fault, what in found.items():
        note = {"case": key, "fault": fault, "what": what[-1500:], "words": case.shown[-1500:]}
        tally.notes.append(note)
    if found and os.environ.get("RELIABILITY_KEEP"):
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f"{folder.name}.log"), ignore_errors=True)


def judged(
    world: World, case: Case, outcome: Outcome, limits: Limits, before: dict[str, Any]
) -> dict[str, str]:
    """The faults of a case, each with what shows it."""
    found: dict[str, str] = {}
    if world.sentinel.exists() or outcome.ran:
        found["code run"] = f"{outcome.ran}"
        world.sentinel.unlink(missing_ok=True)
    if outcome.touched:
        found["outside"] = f"{outcome.touched[:5]}"
    if tree(world.outside) != before:
        found["outside"] = "a file outside differs"
    # A judge that the user named, and that nobody answers for.
    if asked := [one for one in outcome.asked if "127.0.0.1" not in one]:
        found["network"] = f"{asked[:3]}"
    if outcome.status == TRACEBACK or "Traceback (most recent" in outcome.err:
        found["traceback"] = outcome.err
    elif outcome.hung:
        found["hang"] = f"{outcome.seconds:.0f} s of its own"
    elif outcome.status not in (0, 2):
        found["exit"] = f"status {outcome.status}, signal {outcome.signal}: {outcome.err[-300:]}"
    if outcome.memory > limits.memory:
        found["memory"] = f"{outcome.memory >> 20} MiB"
    if outcome.status == 2 and not one_line(outcome.err):
        found["lines"] = outcome.err
    if outcome.status == 0 and case.same is not None and (what := difference(*case.same)):
        found["different"] = what
    return found


def one_line(err: str) -> bool:
    """Whether stderr holds one printable line, progress bars and printable warnings before it aside."""
    lines = [line.rpartition("\r")[2] for line in err.rstrip("\n").split("\n")]
    said = [line for line in lines if line.strip() and not re.search(r"\d+%\||\[\d\d:\d\d", line)]
    *before, last = said or [""]
    warned = all(line.startswith("revelio: warning: ") for line in before)
    return last != "" and warned and all(line.isprintable() and len(line) < 3000 for line in said)


def difference(folder: Path, clean: Path) -> str | None:
    """The first tensor in which two results differ."""
    for path in sorted(clean.rglob("*.safetensors")):
        name = path.relative_to(clean)
        if not (folder / name).is_file():
            return f"{name} is missing"
        wanted, found = load_file(path), load_file(folder / name)
        if wanted.keys() != found.keys():
            return f"{name} has {sorted(found)}"
        for key, tensor in wanted.items():
            if tensor.dtype != found[key].dtype or not torch.equal(tensor, found[key]):
                return f"{name}: {key}"
    return None


def tree(folder: Path) -> dict[str, Any]:
    """What lies below a folder, with contents and times."""
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in folder.rglob("*")
    }
