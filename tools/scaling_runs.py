"""Run small jobs for real, on one process and two, and keep what each was told beforehand and what it took.

`python -m tools.scaling --measure PICTURES` writes docs/benchmarks/plans.json, a run at a time: a stopped
measurement goes on with the runs that are missing. A plan is read from the line that users read.
"""

import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from revelio.reproduce.rows import SIZES
from revelio.run_dir import read_json, write_json
from revelio.trust import read_json_lines
from revelio.wording import plural

SECONDS = {"s": 1, "min": 60, "h": 3600}
BYTES = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
AMOUNT = r"([\d.,]+) (kB|MB|GB)"
CONFIG = "configs/llava/mini"


@dataclass(frozen=True)
class Job:
    """A command, and under which name and with how many processes it is run."""

    name: str
    command: str
    processes: int

    @property
    def key(self) -> str:
        """What a finished run is recognized by."""
        return f"{self.processes} x {self.command}"


def jobs() -> list[Job]:
    """What is run; PICTURES, DATA, STORE, FIRST, VIEWS and OUT are put in."""
    extract = "extract --batch-size 25 --out OUT --backbone.name"
    many = "--layers bottleneck up_ft1 up_ft2 --timesteps 25 100 200 --shard-rows 50"
    train = "train-ksae --store STORE --expansion 64 --batch-size 256 --steps 300 --checkpoint-every 100"
    stage = (
        "--data.json DATA --data.images PICTURES --out OUT --stage.batch-size 4 --stage.epochs 1 "
    )
    # Stage 2 in full: larger steps, or the update of so many weights is all that is measured.
    large = f"{stage}--stage.effective-batch 32 --stage.save-steps 2 --limit 64"
    stage += "--stage.save-steps 4 --limit"
    commands = {
        "extract, mini-sd, one layer": f"{extract} mini-sd --data.source samples --data.limit 800 "
        "--layers up_ft1 --timesteps 25 200 --shard-rows 100",
        "extract, mini-sd-photo, three layers, three timesteps": f"{extract} mini-sd-photo --data.source "
        f"PICTURES --data.limit 400 {many}",
        "llava cache, two towers, one shard": f"llava cache --config {CONFIG}/clip-sd-t25.yaml --data.json "
        "DATA --data.images PICTURES --cache OUT",
        "train-ksae, shared batches": f"{train} --sharing data --out OUT",
        "train-ksae, shared latents": f"{train} --sharing latents --out OUT",
        "llava pretrain": f"llava pretrain --config {CONFIG}/clip.yaml {stage} 96",
        "llava pretrain, ZeRO-2": f"llava pretrain --config {CONFIG}/clip.yaml {stage} 64 --stage.zero 2",
        "llava pretrain, ZeRO-3": f"llava pretrain --config {CONFIG}/clip.yaml {stage} 64 --stage.zero 3",
        "llava finetune, LoRA": f"llava finetune --config {CONFIG}/clip.yaml --pretrained FIRST {stage} 96",
        **{
            f"llava finetune{name}": f"llava finetune --config {CONFIG}/clip.yaml --pretrained FIRST {large} "
            f"--lora.rank 0 --lora.targets all-linear{zero}"
            for name, zero in (
                ("", ""),
                (", ZeRO-2", " --stage.zero 2"),
                (", ZeRO-3", " --stage.zero 3"),
            )
        },
        "train-diffc, views in files": "train-diffc --data.source samples --data.limit 1200 --test.limit 400 "
        "--backbone.name mini-sd --layer up_ft1 --views 1 --epochs 6 --width 256 --batch-size 64 "
        "--cache-gb 0 --cache-dir VIEWS --out OUT",
        "reproduce figure3, mini, one seed": "reproduce figure3 --scale mini --seeds 1 --out OUT",
    }
    return [
        Job(name, command, processes)
        for name, command in commands.items()
        for processes in (1, 2)
        if (name, processes) != ("train-ksae, shared latents", 1)  # one process holds them all
    ]


def measure(place: Path, pictures: Path) -> None:
    """Run what ``place`` lacks, and keep each run as soon as it is done.

    Raises:
        RuntimeError: a command failed; what it said.
    """
    there = read_json(place) if place.exists() else {"machine": _machine(), "runs": []}
    kept = there["runs"]
    with tempfile.TemporaryDirectory() as folder:
        data = _records(pictures, Path(folder) / "data.json")
        for job in jobs():
            if any(run["key"] == job.key for run in kept):
                continue
            print(job.name, job.processes, flush=True)
            out = Path(folder) / f"out{len(kept)}"
            store = Path(folder) / "store" / "up_ft1-t25-empty-d0"
            if "STORE" in job.command and not store.exists():
                words = "extract --backbone.name mini-sd --data.source samples --data.limit 600 --layers"
                _run([*words.split(), "up_ft1", "--timesteps", "25", "--out", str(store.parent)], 1)
            first = Path(folder) / "first"
            if "FIRST" in job.command and not first.exists():
                words = f"llava pretrain --config {CONFIG}/clip.yaml --limit 8 --data.json {data}"
                _run([*words.split(), "--data.images", str(pictures), "--out", str(first)], 1)
            put = {"FIRST": first, "PICTURES": pictures, "DATA": data, "STORE": store, "OUT": out}
            put["VIEWS"] = views_of(out)
            words = [str(put.get(word, word)) for word in job.command.split()]
            told = _run([*words, *_planning(job)], 1).lines if _planning(job) else []
            found = _run(words, job.processes, out)
            found = replace(found, lines=[*told, *found.lines])
            about = {"name": job.name, "processes": job.processes, "key": job.key}
            kept.append(about | {"figures": figures(job.command, found, out)})
            write_json(place, there)


def _planning(job: Job) -> list[str]:
    """What has a command plan that does not say its plan when it runs; several cores do what one does."""
    if not job.command.startswith("reproduce"):
        return []
    return ["--plan", "--teraflops", str(SIZES["mini"].teraflops * job.processes)]


def views_of(out: Path) -> Path:
    """Where a run's kept views are put, which stay there."""
    return out.with_name(f"{out.name}-views")


def _machine() -> str:
    """What the runs are measured on, and how busy it was when the first began."""
    cores = plural(len(os.sched_getaffinity(0)), "CPU core")
    return f"{cores}, under a load of {os.getloadavg()[0]:.1f} when the first run began"


def _records(pictures: Path, place: Path) -> Path:
    """Conversations about 480 pictures of class folders, in LLaVA's format."""
    classes = sorted(path for path in pictures.iterdir() if path.is_dir())[:60]
    files = [file for one in classes for file in sorted(one.glob("*.jpg"))[:8]]
    records = [
        {
            "id": f"{file.parent.name}/{file.name}",
            "image": f"{file.parent.name}/{file.name}",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe the picture."},
                {"from": "gpt", "value": f"a good photo of a {file.parent.name}"},
            ],
        }
        for file in files
    ]
    write_json(place, records)  # pyright: ignore[reportArgumentType]
    return place


@dataclass(frozen=True)
class Ran:
    """What a command printed, when (seconds since its start), its largest process and disk, in bytes."""

    lines: list[tuple[float, str]]
    memory: int
    disk: int

    @property
    def text(self) -> str:
        """All that was printed."""
        return "\n".join(line for _, line in self.lines)

    def when(self, pattern: str) -> float:
        """When a line was printed first that has the pattern."""
        return next(at for at, line in self.lines if re.search(pattern, line))


def _run(words: list[str], processes: int, out: Path | None = None) -> Ran:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] * (processes > 1)
    command = [sys.executable, *launch, "-m", "revelio", *words]
    began, disk, lines = time.monotonic(), [0], []
    ran = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    watch = threading.Thread(target=_watch, args=(ran, out, disk), daemon=True)
    watch.start()
    assert ran.stdout is not None
    for line in ran.stdout:
        lines.append((time.monotonic() - began, line.rstrip()))
    _, status, used = os.wait4(ran.pid, 0)
    ran.returncode = os.waitstatus_to_exitcode(status)
    watch.join()
    done = Ran(lines, 1024 * used.ru_maxrss, disk[0])
    if ran.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.text[-3000:]}")
    return done


def _watch(ran: subprocess.Popen[str], out: Path | None, most: list[int]) -> None:
    """Keep the most bytes that lay in ``out``."""
    while out is not None and ran.returncode is None:
        most[0] = max(most[0], sum(_sizes(out)))
        time.sleep(0.05)


def _sizes(folder: Path, names: str = "*") -> Iterator[int]:
    # Folders and files may go while one looks.
    for place, _, files in os.walk(folder):
        for name in fnmatch.filter(files, names):
            with suppress(FileNotFoundError):
                yield (Path(place) / name).stat().st_size


def figures(command: str, ran: Ran, out: Path) -> Mapping[str, list[float]]:
    """By what is compared: planned and measured; seconds and megabytes."""
    by = {
        "extract": _extracted,
        "train-ksae": _trained,
        "train-diffc": _classified,
        "reproduce": _reproduced,
    }
    words = command.split()
    return (
        by.get(words[0]) or {"cache": _cached, "pretrain": _stage, "finetune": _stage}[words[1]]
    )(ran, out)


def _extracted(ran: Ran, out: Path) -> dict[str, list[float]]:
    found = re.search(rf"plan: ([\d,]+) images .* at (\S+) images/s.*stores?, {AMOUNT}", ran.text)
    assert found is not None, ran.text
    images, rate, *planned = found.groups()
    took = ran.when(r"stores? in .*, in ") - ran.when("plan: ")
    return {
        "s": [_number(images) / float(rate), took],
        "disk, MB": [_bytes(planned), sum(_sizes(out, "*.safetensors")) / 1e6],
    }


def _cached(ran: Ran, out: Path) -> dict[str, list[float]]:
    images = re.search(r"plan: ([\d,]+) of", ran.text)
    chosen = re.search(rf"-> \S+ +{AMOUNT}, .* at (\S+) images/s", ran.text)
    assert images is not None and chosen is not None, ran.text
    took = ran.when(r"stores? in ") - ran.when("plan: ")
    return {
        "s": [_number(images[1]) / float(chosen[3]), took],
        "disk, MB": [_bytes(chosen.groups()[:2]), sum(_sizes(out, "*.safetensors")) / 1e6],
    }


def _trained(ran: Ran, out: Path) -> dict[str, list[float]]:
    found = re.search(
        rf"rows, (?:\d+ \w+ to )?(\d+) (s|min|h) .*memory {AMOUNT}.*disk {AMOUNT}", ran.text
    )
    assert found is not None, ran.text
    count, unit, *sizes = found.groups()
    return {
        "s": [int(count) * SECONDS[unit], read_json(out / "report.json")["seconds"]],
        "memory of a process, MB": [_bytes(sizes[:2]), ran.memory / 1e6],
        "disk at most, MB": [_bytes(sizes[2:]), ran.disk / 1e6],
    }


def _classified(ran: Ran, out: Path) -> dict[str, list[float]]:
    views = re.findall(rf"grids: ([\d,]+) of \S+, {AMOUNT} in .*, (\S+) images/s", ran.text)
    took = re.search(r"TFLOP in all, (\d+|\d+\.\d+) (s|min|h) with the tests", ran.text)
    assert len(views) == 2 and took is not None, ran.text
    seconds = read_json(out / "report.json")["seconds"]
    making = sum(_number(count) / float(rate) for count, *_, rate in views)
    return {
        "views, s": [making, seconds["views"]],
        "trainings and tests, s": [float(took[1]) * SECONDS[took[2]], seconds["training"]],
        "kept views, MB": [
            sum(_bytes(amount) for _, *amount, _ in views), sum(_sizes(views_of(out), "*.bin")) / 1e6,
        ],
    }  # fmt: skip


def _reproduced(ran: Ran, out: Path) -> dict[str, list[float]]:
    found = re.search(rf"plan: \d+ runs?, {AMOUNT} on disk, about ([\d.]+) (s|min|h) at", ran.text)
    assert found is not None, ran.text
    *disk, count, unit = found.groups()
    stored = (*_sizes(out, "shard-*.safetensors"), *_sizes(out, "model.safetensors"))
    return {
        "s of multiplications (a lower bound)": [
            float(count) * SECONDS[unit], ran.when("^wrote .*figure"),
        ],
        "disk, MB": [_bytes(disk), sum(stored) / 1e6],
    }  # fmt: skip


def _stage(ran: Ran, out: Path) -> dict[str, list[float]]:
    disk = re.search(
        rf"checkpoints of {AMOUNT}, at most (\d+) at once; the model {AMOUNT}", ran.text
    )
    held = re.search(rf"memory of a process: {AMOUNT}", ran.text)
    assert disk is not None and held is not None, ran.text
    checkpoint, model = (_bytes(disk.groups()[:2]), _bytes(disk.groups()[3:]))
    (last,) = (out / "checkpoints").glob("checkpoint-*")
    state = _bytes(held.groups())
    report = read_json(out / "report.json")
    found = {
        "a checkpoint, MB": [checkpoint, sum(_sizes(last)) / 1e6],
        "the model's weights, MB": [model, sum(_sizes(out / "final", "*.safetensors")) / 1e6],
        "memory of a process without libraries and activations (a lower bound), MB": [
            state, report["peak_memory_bytes"] / 1e6,
        ],
    }  # fmt: skip
    rate = re.search(r" at (\S+) s a sample", ran.text)
    if rate is not None:  # under ZeRO-3 the bar tells
        took = list(read_json_lines(out / "metrics.jsonl"))[-1]["seconds"]
        share = report["samples"] / report["processes"]
        found = {"s": [share * float(rate[1]), took], **found}
    return found


def _bytes(amount: Any) -> float:
    """Megabytes."""
    count, unit = amount
    return _number(count) * BYTES[unit] / 1e6


def _number(text: str) -> float:
    return float(text.replace(",", ""))
