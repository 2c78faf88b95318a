"""The long campaign: hostile inputs, kills, full disks, twins and crash points, with counts.

    python tools/reliability.py               docs/reliability.json and docs/reliability.md; some 45 minutes
    python tools/reliability.py --quick       a few of each, for CI
    python tools/reliability.py --render      the document from the numbers again

Every input is given to the real command line in a process of its own, beside files of somebody else that it
must neither open nor change, and modules and pickles that would leave a file if they ran. Every kill is one
of SIGKILL, every full disk a small tmpfs (left out, and said, where mounting is not allowed). The status is
1 where anything was not as it should be; the cases are in the JSON file, by the seed they can be made from.
Every command that writes is in the table of tests/cli_helpers.py; a test fails where one is not.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT)]

DOCS = ROOT / "docs"
# Of each part in the long form and in the quick one.
INPUTS = (1100, 15)
DISKS = (4, 1)
TWINS = (2, 1)
# How often a command is killed: most where it takes long enough for a kill to meet its middle.
KILLS = {"extract": 12, "train-ksae": 12, "train-diffc": 12, "demo": 2}
KILLS |= {"zero-shot": 6, "advise": 6, "llava pretrain": 4, "llava finetune": 4}
OTHER_KILLS = 2
# Every file operation is a crash point, but of those whose many are one like another only every so many.
EVERY = {"gallery": 5, "demo": 23, "llava pretrain": 3, "llava finetune": 3, "eval-ksae": 2}
# What the quick form does.
QUICK_STEPS, QUICK_KILLS, QUICK_WRITERS = {"top-images": 7}, {"train-diffc": 1}, ("top-images",)
PARTS = ("inputs", "kills", "crash_points", "full_disks", "twins")
LEFT_OUT = "left out: mounting is not allowed here"
CHANGED = ("XDG_CACHE_HOME", "HF_HOME", "REVELIO_SENTINEL")


INPUTS_TEXT = """\
Each was given to the command line in a process of its own. Code run: a module, pickle or program that came
with the input ran. Outside: a file outside the output was opened for writing, or somebody else's was read.
Different: it ended well with other tensors than the honest input gives (compared for stores and runs, where
damage can be told from an edit). Exit: a status other than 0 and 2.
Hang: 30 s of its own time, or 300 s on the clock. Memory: 1 GiB more than at the start. Lines: the refusal
was not one printable line.
"""
STOPS_TEXT = """\
How many there were, and after how many the next run of the command (`--resume` where there is one) gave the
same bytes, times aside, as a run that was never stopped, with nothing half-written left; a command that takes
new places only may refuse what it had finished. Kills: SIGKILL at random moments, up to three in a row. Crash
points: the process ends before its file operation 1, 2, 3, ... Full disks: the output on a tmpfs that is too
small, refused in one line, then room (0: it fits into the smallest). Twins: two processes at once.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; gives 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="where reliability.json and .md go")
    parser.add_argument("--inputs", type=int, help=f"hostile inputs (default {INPUTS[0]})")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and the kills")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument(
        "--every", type=int, default=1, help="of the crash points, only every so many"
    )
    parser.add_argument("--commands", nargs="+", help="stop only these")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--render", action="store_true", help="only write the document again")
    options = parser.parse_args(arguments)
    path = options.out / "reliability.json"
    if not options.render:
        options.out.mkdir(parents=True, exist_ok=True)
        campaign(options, path)
    found = json.loads(path.read_text())
    page = render(found)
    (options.out / "reliability.md").write_text(page)
    print(page)
    return int(bad(found) > 0)


def campaign(options: argparse.Namespace, path: Path) -> None:
    """Every part that is asked for; what each came to is added to the file when it is done."""
    import torch
    from campaign import world

    # What counts as a hang, and equal bytes, are those of one thread.
    torch.set_num_threads(1)
    # The client of judges tells its server the processor's name: Python runs `uname` for it, once a process.
    platform.processor()
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    kept = {name: os.environ.get(name) for name in CHANGED}
    try:
        tell("writing what the cases start from")
        made = world.build(folder / "w")
        plans = parts(made, options)
        for part in options.parts:
            began = time.monotonic()
            found = plans[part]()
            row = {"seed": options.seed, "seconds": round(time.monotonic() - began), "found": found}
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(before | {"machine": machine(), part: row}, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def shared_attacks(made: Any, inputs: int, seed: int, processes: int) -> dict[str, Any]:
    """Hostile inputs by kind, shared out over processes, each with a seed of its own."""
    seeds = [seed + 1000 * number for number in range(processes)]
    # Forked, so that what the cases start from is imported and written once.
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        share = -(-inputs // processes)
        first, *others = pool.map(partial(attacks, made, share), seeds)
    for kind, row in ((kind, row) for found in others for kind, row in found.items()):
        for name, value in row.items():
            if name == "faults":
                first[kind][name] = dict(Counter(first[kind][name]) + Counter(value))
            elif name in ("longest_s", "memory_mib"):
                first[kind][name] = max(first[kind][name], value)
            else:
                first[kind][name] += value
    return first


def attacks(made: Any, inputs: int, seed: int) -> dict[str, Any]:
    """Hostile inputs by kind."""
    from campaign.attacks import attack

    return {
        name: {
            "inputs": tally.inputs,
            "refused": tally.refused,
            "faults": dict(tally.faults),
            "longest_s": round(tally.seconds, 2),
            "memory_mib": tally.memory >> 20,
            "notes": tally.notes,
        }
        for name, tally in attack(made, inputs, seed, tell).items()
    }


def parts(made: Any, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What each part does."""
    from campaign import stops
    from cli_helpers import WRITERS

    quick, seed = options.quick, options.seed
    writers = options.commands or (QUICK_WRITERS if quick else tuple(WRITERS))
    counts = QUICK_KILLS if quick else {name: KILLS.get(name, OTHER_KILLS) for name in WRITERS}
    steps = QUICK_STEPS if quick else {name: EVERY.get(name, 1) for name in WRITERS}
    if options.commands:
        counts, steps = ({one: of[one] for one in writers} for of in (counts, steps))
    steps = {name: step * options.every for name, step in steps.items()}
    shared = partial(by_command, processes=options.processes)
    return {
        "inputs": lambda: shared_attacks(
            made, options.inputs or INPUTS[quick], seed, options.processes
        ),
        "kills": lambda: shared(counts, partial(stops.kills, made, counts=counts, seed=seed)),
        "crash_points": lambda: shared(steps, partial(stops.crash_points, made, steps=steps)),
        "full_disks": lambda: shared(writers, partial(stops.full_disks, made, count=DISKS[quick])),
        "twins": lambda: shared(writers, partial(stops.twins, made, count=TWINS[quick], seed=seed)),
    }


def by_command(
    names: Iterable[str], action: Callable[[str], Any], processes: int
) -> dict[str, Any] | str:
    """What the stops of each command came to."""
    found = {}
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        for name, one in zip(names, pool.map(action, names), strict=True):
            if one is None:
                return LEFT_OUT
            found[name] = {"stops": one.stops, "same": one.same, "notes": one.notes}
            found[name] |= {"every": one.every} if one.every > 1 else {}
            tell(f"{name}: {one.same} of {one.stops}")
    return found


def machine() -> str:
    """The kind of machine, without its name."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores, {system}"


def tell(line: str) -> None:
    """Say how far it is."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def bad(found: dict[str, Any]) -> int:
    """How many cases were not as they should be."""
    kinds = found.get("inputs", {}).get("found", {})
    faults = sum(sum(kind["faults"].values()) for kind in kinds.values())
    rows = (row for part in stops_of(found) if isinstance(part, dict) for row in part.values())
    return faults + sum(row["stops"] - row["same"] for row in rows)


def stops_of(found: dict[str, Any]) -> list[Any]:
    """What the four kinds of stops came to."""
    return [found.get(part, {}).get("found", {}) for part in PARTS[1:]]


def render(found: dict[str, Any]) -> str:
    """The document."""
    from campaign.attacks import FAULTS

    kinds = found["inputs"]["found"]
    total = {
        fault: sum(kind["faults"].get(fault, 0) for kind in kinds.values()) for fault in FAULTS
    }
    count = sum(kind["inputs"] for kind in kinds.values())
    lines = [
        "# Reliability",
        "",
        f"`make reliability` (`python tools/reliability.py`) on {found['machine']}:",
        f"{sum(found[part]['seconds'] for part in PARTS if part in found)} s. All numbers, and the cases "
        f"that were not as they should be, are in `reliability.json`. {found.get('note', '')}".rstrip(),
        "",
        f"## {count:,} hostile inputs",
        INPUTS_TEXT,
        f"| input | run | refused | {' | '.join(FAULTS)} | longest s | MiB |",
        f"|---|{'--:|' * (len(FAULTS) + 4)}",
    ]
    for name, kind in kinds.items():
        cells = " | ".join(str(kind["faults"].get(fault, 0)) for fault in FAULTS)
        lines.append(
            f"| {name} | {kind['inputs']} | {kind['refused']} | {cells} "
            f"| {kind['longest_s']:.1f} | {kind['memory_mib']} |"
        )
    cells = " | ".join(f"**{total[fault]}**" for fault in FAULTS)
    refused = sum(kind["refused"] for kind in kinds.values())
    longest = max(kind["longest_s"] for kind in kinds.values())
    memory = max(kind["memory_mib"] for kind in kinds.values())
    lines += [f"| **all** | **{count}** | **{refused}** | {cells} | {longest:.1f} | {memory} |", ""]
    return "\n".join(lines + stop_tables(found)) + "\n"


def stop_tables(found: dict[str, Any]) -> list[str]:
    """The tables of kills, crash points, full disks and twins."""
    lines = [
        "## Kills, crash points, full disks, twins",
        STOPS_TEXT,
        "| command | kills | crash points | full disks | twins |",
        "|---|--:|--:|--:|--:|",
    ]
    parts = stops_of(found)
    names = dict.fromkeys(name for part in parts if isinstance(part, dict) for name in part)
    for name in names:
        cells = [cell(part.get(name)) if isinstance(part, dict) else "left out" for part in parts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if isinstance(parts[2], str):
        lines += ["", f"Full disks were {parts[2]}."]
    return lines


def cell(row: dict[str, Any] | None) -> str:
    """`same / stops`."""
    if row is None:
        return ""
    every = row.get("every", 1)
    return f"{row['same']} / {row['stops']}" + (f" (one in {every})" if every > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
