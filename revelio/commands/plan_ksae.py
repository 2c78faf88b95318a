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

if TYPE_CHECKING:
    from revelio.sae.plan import Job, Speed


@dataclass(frozen=True)
class Config:
    """The sizes, and the devices to train on."""

    store: Path | None = None
    """An activation store, which gives the rows and their width."""

    rows: int | None = None
    """Activations to train on, without a store."""

    d: int | None = None
    """Their width, without a store."""

    n: int | None = None
    """Latents; none: `expansion` times d."""

    expansion: int = 64
    """Latents a dimension of the activations."""

    k: int = 32
    """Latents that stay active, an image."""

    batch_size: int = 8192
    """Rows a step, all devices together; a smaller store is one full batch."""

    steps: int = 10_240
    """Updates."""

    devices: int = 1
    """Processes, each with a device of its own."""

    sharing: Literal["data", "latents"] = "data"
    """Whether they share every batch, or the latents (for k-SAEs that do not fit one)."""

    flops: float | None = None
    """A device's floating-point operations a second; none: measured here."""

    memory_gib: float = 4.0
    """A store up to this size is held in memory."""

    json: bool = False
    """Print JSON instead of a table."""


def run(config: Config) -> None:
    """Print the plan."""
    import json

    from revelio.sae.kernel_choice import choose_kernel
    from revelio.sae.plan import given_speed, measured_speed

    job = build(config)
    if config.flops is None:
        speed = measured_speed(job, choose_kernel().kernel)
    else:
        speed = given_speed(job, config.flops)
    print(json.dumps(figures(job, speed), indent=2) if config.json else table(job, speed))


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


def figures(job: "Job", speed: "Speed") -> dict[str, Any]:
    """The plan as plain values: bytes and seconds."""
    from dataclasses import asdict

    from revelio.sae.plan import disk, memory

    held, files = memory(job), disk(job)
    return {
        "job": asdict(job) | {"local_latents": job.local_latents, "local_rows": job.local_rows},
        "memory_of_a_process": asdict(held) | {"total": held.total},
        "seconds": {
            "step": speed.step,
            "step_slowest": speed.slowest,
            "total": job.steps * speed.step,
            "total_slowest": job.steps * speed.slowest,
            "rows_per_second": job.batch_size / speed.step,
            "how": speed.how,
        },
        "disk": asdict(files) | {"written": files.written},
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
        f"memory {size(memory(job).total)}{where}; disk {size(disk(job).written)}"
    )


def table(job: "Job", speed: "Speed") -> str:
    """The plan as a table for people."""
    from revelio.activations.plan import duration, size
    from revelio.sae.plan import disk, memory

    held, files = memory(job), disk(job)
    shared = "" if job.devices == 1 else f", {job.devices} devices share the {job.sharing}"
    entries = [
        ("k-SAE", f"d {job.d:,}, n {job.n:,}, k {job.k}{shared}"),
        ("data", f"{job.rows:,} rows, {job.steps:,} steps of {job.batch_size:,}"),
        ("memory of a process", size(held.total)),
        ("  weights", size(held.weights)),
        ("  Adam's moments", size(held.moments)),
        ("  buffers", size(held.buffers)),
        ("  rows" + ("" if job.held else ", streamed"), size(held.rows)),
        ("  Python and PyTorch", size(held.process)),
        ("time of a step", f"{speed.step:.3g} to {speed.slowest:.3g} s ({speed.how})"),
        ("rows a second", f"{job.batch_size / speed.slowest:,.0f} to {job.batch_size / speed.step:,.0f}"),
        ("time", f"{duration(job.steps * speed.step)} to {duration(job.steps * speed.slowest)}"),
        ("disk to write", size(files.written)),
        ("  model", size(files.model)),
        ("  checkpoints", f"{files.checkpoints} of {size(files.checkpoint)}"),
        ("disk of the store", size(files.store)),
    ]  # fmt: skip
    width = max(len(name) for name, _ in entries)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in entries)
