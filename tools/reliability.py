"""The long campaign: hostile inputs, kills, full disks, twins and crash points, with counts.

    python tools/reliability.py               docs/reliability.json and docs/reliability.md; some 15 minutes
    python tools/reliability.py --quick       a few of each, for CI
    python tools/reliability.py --render      the document from the numbers again

Every input is given to the real command line in a process of its own, beside files of somebody else that it
must neither open nor change, and modules and pickles that would leave a file if they ran. Every kill is one
of SIGKILL, every full disk a small tmpfs (left out, and said, where mounting is not allowed). The status is
1 where anything was not as it should be; the cases are in the JSON file, by the seed they can be made from.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT)]

DOCS = ROOT / "docs"
# Of each part in the long form and in the quick one.
INPUTS = (1100, 15)
KILLS = ({"extract": 20, "train-ksae": 20, "train-diffc": 20, "demo": 5}, {"train-diffc": 2})
DISKS = (8, 2)
TWINS = (4, 1)
# Every so many file operations: a gallery's are mostly one thumbnail after another.
CRASHES = (
    {
        **{"extract": 1, "train-ksae": 1, "train-diffc": 1, "top-images": 1, "purity": 1},
        **{"score": 1, "pca-maps": 1, "eval-diffc": 1, "gallery": 5},
    },
    {"top-images": 5, "eval-diffc": 11},
)
WRITERS = (
    "extract",
    "train-ksae",
    "train-diffc",
    "top-images",
    "gallery",
    "pca-maps",
    "eval-diffc",
)


INPUTS_TEXT = """\
Each was given to the command line in a process of its own. Code run: a module, pickle or program that came
with the input ran. Outside: a file outside the output was opened for writing, or somebody else's was read.
Different: it ended well with other tensors than the honest input gives. Exit: a status other than 0 and 2.
Hang: 30 s. Memory: 1 GiB more than at the start. Lines: the refusal was not one printable line.
"""
STOPS_TEXT = """\
How many there were, and after how many the next run of the command (`--resume` where there is one) gave the
same bytes, times aside, as a run that was never stopped, with nothing half-written left. Kills: SIGKILL at
random moments, up to three in a row. Crash points: the process ends before its file operation 1, 2, 3, ...
Full disks: the output on a tmpfs that is too small, refused in one line, then room. Twins: two processes at
once in one folder.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; gives 0 where nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DOCS, help="where reliability.json and .md go")
    parser.add_argument("--inputs", type=int, help=f"hostile inputs (default {INPUTS[0]})")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and the kills")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--render", action="store_true", help="only write the document again")
    options = parser.parse_args(arguments)
    path = options.out / "reliability.json"
    if not options.render:
        found = campaign(options.quick, options.seed, options.inputs)
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=True) + "\n")
    found = json.loads(path.read_text())
    page = render(found)
    (options.out / "reliability.md").write_text(page)
    print(page)
    return int(bad(found) > 0)


def campaign(quick: bool, seed: int, inputs: int | None) -> dict[str, Any]:
    """Every part of the campaign; what each came to."""
    import torch
    from campaign import world

    # What counts as a hang, and equal bytes, are those of one thread.
    torch.set_num_threads(1)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    kept = {
        name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "HF_HOME", "REVELIO_SENTINEL")
    }
    found: dict[str, Any] = {"command": command(quick, seed, inputs), "machine": machine()}
    try:
        tell("writing what the cases start from")
        made = world.build(folder / "w")
        found["inputs"] = attacks(made, inputs or INPUTS[quick], seed)
        found |= stops(made, quick, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return found | {"seconds": round(time.monotonic() - began)}


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


def stops(made: Any, quick: bool, seed: int) -> dict[str, Any]:
    """Kills, crash points, full disks and twins, by command."""
    from campaign.stops import crash_points, full_disks, kills, twins

    rng = Random(seed)
    writers = WRITERS[3:4] if quick else WRITERS
    plans = {
        "kills": {
            name: lambda n=name, c=count: kills(made, n, c, rng)
            for name, count in KILLS[quick].items()
        },
        "crash_points": {
            name: lambda n=name, s=step: crash_points(made, n, s)
            for name, step in CRASHES[quick].items()
        },
        "full_disks": {name: lambda n=name: full_disks(made, n, DISKS[quick]) for name in writers},
        "twins": {name: lambda n=name: twins(made, n, TWINS[quick], rng) for name in writers},
    }
    found: dict[str, Any] = {}
    for part, commands in plans.items():
        found[part] = {}
        for name, action in commands.items():
            one = action()
            if one is None:
                found[part] = "left out: mounting is not allowed here"
                break
            found[part][name] = {"stops": one.stops, "same": one.same, "notes": one.notes}
            tell(f"{part} {name}: {one.same} of {one.stops}")
    if isinstance(found["crash_points"], dict):
        for name, step in CRASHES[quick].items():
            found["crash_points"][name]["every"] = step
    return found


def command(quick: bool, seed: int, inputs: int | None) -> str:
    """The line that does it again."""
    words = ["python tools/reliability.py", *(["--quick"] if quick else []), f"--seed {seed}"]
    return " ".join([*words, *([f"--inputs {inputs}"] if inputs else [])])


def machine() -> str:
    """The kind of machine, without its name."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores (one used), {system}"


def tell(line: str) -> None:
    """Say how far it is."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def bad(found: dict[str, Any]) -> int:
    """How many cases were not as they should be."""
    faults = sum(sum(kind["faults"].values()) for kind in found["inputs"].values())
    parts = (found[part] for part in ("kills", "crash_points", "full_disks", "twins"))
    rows = (row for part in parts if isinstance(part, dict) for row in part.values())
    return faults + sum(row["stops"] - row["same"] for row in rows)


def render(found: dict[str, Any]) -> str:
    """The document."""
    from campaign.attacks import FAULTS

    kinds = found["inputs"]
    total = {
        fault: sum(kind["faults"].get(fault, 0) for kind in kinds.values()) for fault in FAULTS
    }
    count = sum(kind["inputs"] for kind in kinds.values())
    lines = [
        "# Reliability",
        "",
        f"`{found['command']}`, {found['seconds']} s on {found['machine']}.",
        "`make reliability` does it again; the numbers are in `reliability.json`.",
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
    parts = [found[part] for part in ("kills", "crash_points", "full_disks", "twins")]
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
    return f"{row['same']} / {row['stops']}" + (f" (every {every}th)" if every > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
