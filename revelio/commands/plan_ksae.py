"""What training a k-SAE would cost: memory of each process, time, disk. Writes nothing.

    revelio plan-ksae --store runs/pets/up_ft1-t25-empty-d0 --batch-size 256
    revelio plan-ksae --rows 1281167 --d 1280 --expansion 256 --devices 8 --sharing latents --flops 60e12
    revelio plan-ksae --rows 7349 --d 1280 --json

Time comes from about a second of real steps on this machine, or from a device's FLOP/s (a lower bound:
products only). It is a range: at first few latents' rows move, at worst every row does at each step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from revelio.bounds import Count, Folder, NotNegative, Positive
from revelio.machine import available_memory, free_disk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from revelio.sae.plan import Job, Speed


@dataclass(frozen=True)
class Config:
    """The sizes, and the devices to train on."""

    store: Folder | None = None
    """An activation store, which gives the rows and their width."""

    rows: Count | None = None
    """Activations to train on, without a store."""

    d: Count | None = None
    """Their width, without a store."""

    n: Count | None = None
    """Latents; none: `expansion` times d."""

    expansion: Count = 64
    """Latents a dimension of the activations."""

    k: Count = 32
    """Latents that stay active, an image."""

    batch_size: Count = 8192
    """Rows a step, all devices together; a smaller store is one full batch."""

    steps: Count = 10_240
    """Updates."""

    devices: Count = 1
    """Processes, each with a device of its own."""

    sharing: Literal["data", "latents"] = "data"
    """Whether they share every batch, or the latents (for k-SAEs that do not fit one)."""

    flops: Positive | None = None
    """A device's floating-point operations a second; none: measured here."""

    memory_gib: NotNegative = 4.0
    """A store up to this size is held in memory."""

    json: bool = False
    """Print JSON instead of a table."""


def run(config: Config) -> None:
    """Print the plan."""
    import json
    import sys

    from revelio.sae.kernel_choice import choose_kernel
    from revelio.sae.plan import given_speed, measured_speed

    job = build(config)
    if config.flops is not None:
        speed = given_speed(job, config.flops)
    else:
        speed = measured_speed(job, choose_kernel().kernel) if can_measure(job) else None
    print(json.dumps(figures(job, speed), indent=2) if config.json else table(job, speed))
    reason = shortage([job], Path(), in_memory=config.flops is None)
    if reason is not None:
        print(f"warning: {reason}", file=sys.stderr)
    if not config.json:
        print(_next(config))


def _next(config: Config) -> str:
    from revelio.following import following

    asked = {"expansion": config.n // config.d if config.n and config.d else config.expansion}
    asked |= {"k": config.k, "batch-size": config.batch_size, "steps": config.steps}
    words = [word for name, value in asked.items() for word in (f"--{name}", value)]
    return following("train-ksae", "--store", config.store or "STORE", *words, "--out", "runs/ksae")


def build(config: Config) -> "Job":
    """The job that the config describes.

    Raises:
        ValueError: sizes that are missing or make no sense.
    """
    from revelio.activations.store import ActivationStore
    from revelio.sae.plan import Job

    rows, d, row_bytes = config.rows, config.d, 4
    if config.store is not None:
        if rows is not None or d is not None:
            raise ValueError("give a store, or rows and d, not both")
        store = ActivationStore.open(config.store)
        rows, d = len(store), store.row_shape[0]
        row_bytes = 4 if store.manifest["dtype"] == "float32" else 2
    if rows is None or d is None:
        raise ValueError("give --store, or --rows and --d")
    return Job(
        rows=rows,
        d=d,
        n=config.n or config.expansion * d,
        k=config.k,
        batch_size=min(config.batch_size, max(rows, 1)),
        steps=config.steps,
        devices=config.devices,
        sharing=config.sharing,
        held=4 * rows * d <= config.memory_gib * 2**30,
        row_bytes=row_bytes,
    )


def can_measure(job: "Job") -> bool:
    """Whether some batches of the job's, which a measured step takes, fit the memory that is left."""
    available = available_memory()
    return available is None or 16 * 4 * job.local_rows * job.d < available


def shortage(jobs: "Sequence[Job]", out: Path, *, in_memory: bool) -> str | None:
    """What does not fit this machine when the jobs run together in each process; None where all fits.

    Args:
        jobs: k-SAEs of the same store.
        out: where they are written.
        in_memory: whether they train in this machine's own memory, not in an accelerator's.
    """
    from revelio.activations.plan import size
    from revelio.sae.plan import disk, memory

    held = [memory(job) for job in jobs]
    shared = max(part.rows for part in held)
    # What Python itself takes is taken already.
    need = shared + sum(part.total - part.rows - part.process for part in held)
    written = sum(disk(job).written for job in jobs)
    available, free = available_memory() if in_memory else None, free_disk(out)
    parts = []
    if available is not None and need > available:
        parts.append(f"{size(need)} of memory, of which {size(available)} are available")
    if free is not None and written > free:
        parts.append(f"{size(written)} of disk, of which {size(free)} are free")
    return f"this does not fit: it takes {' and '.join(parts)}" if parts else None


def figures(job: "Job", speed: "Speed | None") -> dict[str, Any]:
    """The plan as plain values: bytes and seconds."""
    from dataclasses import asdict

    from revelio.sae.plan import disk, memory

    held, files = memory(job), disk(job)
    return {
        "job": asdict(job) | {"local_latents": job.local_latents, "local_rows": job.local_rows},
        "memory_of_a_process": asdict(held) | {"total": held.total},
        "seconds": None if speed is None else _seconds(job, speed),
        "disk": asdict(files) | {"written": files.written},
    }


def _seconds(job: "Job", speed: "Speed") -> dict[str, Any]:
    return {
        "step": speed.step,
        "step_slowest": speed.slowest,
        "total": job.steps * speed.step,
        "total_slowest": job.steps * speed.slowest,
        "rows_per_second": job.batch_size / speed.step,
        "how": speed.how,
    }


def line(job: "Job", speed: "Speed | None") -> str:
    """The plan in one line; without a speed it says nothing of time."""
    from revelio.activations.plan import duration, size
    from revelio.sae.plan import disk, memory

    shared = (
        f"{job.devices} processes share the {'batches' if job.sharing == 'data' else 'latents'}"
    )
    where = f" a process ({shared})" if job.devices > 1 else ""
    time = ""
    if speed is not None:
        fast, slow = (duration(job.steps * each) for each in (speed.step, speed.slowest))
        time = f", {fast} to {slow} ({speed.how})" if fast != slow else f", {fast} ({speed.how})"
    return (
        f"plan: {job.steps:,} steps of {job.batch_size:,} rows{time}; "
        f"memory {size(memory(job).total)}{where}{_there(available_memory(), 'available')}; "
        f"disk {size(disk(job).written)}"
    )


def _there(count: int | None, word: str) -> str:
    from revelio.activations.plan import size

    return "" if count is None else f" ({size(count)} {word})"


def table(job: "Job", speed: "Speed | None") -> str:
    """The plan as a table for people."""
    from revelio.activations.plan import size
    from revelio.sae.plan import disk, memory

    held, files = memory(job), disk(job)
    shared = "" if job.devices == 1 else f", {job.devices} devices share the {job.sharing}"
    entries = [
        ("k-SAE", f"d {job.d:,}, n {job.n:,}, k {job.k}{shared}"),
        ("data", f"{job.rows:,} rows, {job.steps:,} steps of {job.batch_size:,}"),
        ("memory of a process", size(held.total) + _there(available_memory(), "available here")),
        ("  weights", size(held.weights)),
        ("  Adam's moments", size(held.moments)),
        ("  buffers", size(held.buffers)),
        ("  rows" + ("" if job.held else ", streamed"), size(held.rows)),
        ("  Python and PyTorch", size(held.process)),
        *_times(job, speed),
        ("disk to write", size(files.written) + _there(free_disk(Path()), "free here")),
        ("  model", size(files.model)),
        ("  checkpoints", f"{files.checkpoints} of {size(files.checkpoint)}"),
        ("disk of the store", size(files.store)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in entries)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in entries)


def _times(job: "Job", speed: "Speed | None") -> list[tuple[str, str]]:
    from revelio.activations.plan import duration

    if speed is None:
        return [("time", "not measured: a batch does not fit this machine")]
    fast, slow = speed.step, speed.slowest
    return [
        ("time of a step", f"{fast:.3g} to {slow:.3g} s ({speed.how})"),
        ("rows a second", f"{job.batch_size / slow:,.0f} to {job.batch_size / fast:,.0f}"),
        ("time", f"{duration(job.steps * fast)} to {duration(job.steps * slow)}"),
    ]
