"""What training a k-SAE would cost, in figures and in words; see :mod:`revelio.sae.cost`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from revelio.activations.store import ActivationStore
from revelio.machine import available_memory, duration, free_disk, size
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.held_out import count, said, share_of
from revelio.pipelines.sae_rows import JoinedRows
from revelio.sae.config import RunConfig
from revelio.sae.cost import (
    CONTEXT_BYTES,
    Job,
    Speed,
    devices_memory,
    disk,
    given_speed,
    measured_speed,
    memory,
    smaller_batch,
)
from revelio.sae.kernels.select import COMPILING, choose_kernel, must_compile
from revelio.text_tables import columns
from revelio.wording import plural

# The share of the steps beyond which a warm-up is remarked on: little is left to train at the full rate.
MOST_WARMUP = 0.25
# Of few rows not even this many latents a dimension need be fewer than the rows (docs/evidence.md).
LEAST_EXPANSION = 2


def job_of(
    config: RunConfig,
    stores: Sequence[ActivationStore],
    devices: int = 1,
    *,
    rows: int | None = None,
    latents: int | None = None,
) -> Job:
    """What is to be trained on ``rows`` rows of stores; None: on one an image, but for those kept out.

    Raises:
        ValueError: the sizes make no sense.
    """
    images = sum(store.images for store in stores)
    return Job(
        config=config,
        rows=images - count(share_of(config), images) if rows is None else rows,
        d=stores[0].row_shape[0],
        latents=latents,
        devices=devices,
        row_bytes=4 if stores[0].manifest["dtype"] == "float32" else 2,
        store_bytes=sum(store.bytes for store in stores),
    )


def refuse_shortage(
    jobs: Sequence[Job], out: Path, device: torch.device, progress: Report = silent
) -> None:
    """Say before anything is allocated that it does not fit.

    Raises:
        ValueError: it does not; the plans were reported before.
    """
    reason = shortage(jobs, out, in_memory=device.type == "cpu")
    if device.type == "cuda" and reason is None:
        lacks = device_shortage(jobs, torch.cuda.mem_get_info(device)[0])
        if lacks is not None:
            raise ValueError(lacks)
    if reason is not None:
        progress(Progress("\n".join(line(job, None) for job in jobs)))
        raise ValueError(f"{reason}: lower expansion, batch_size or memory_gib")


def announce(
    jobs: Sequence[Job], device: torch.device, progress: Report, done: Sequence[int] = ()
) -> None:
    """Report which kernel trains, what trains, and what it costs by the second that is measured for it.

    Args:
        jobs: k-SAEs that train together.
        device: that they train on.
        progress: is told.
        done: the steps that each has behind it; left out, none.
    """
    name = jobs[0].config.kernel
    if must_compile(name, device):
        progress(Progress(COMPILING))
    chosen = choose_kernel(name, device)
    progress(Progress(chosen.reason))
    for number, job in enumerate(jobs):
        behind = done[number] if done else 0
        learnt = job.config.activation == "jumprelu"
        thresholds = ", threshold" if learnt else ""
        count = 2 * job.n * job.d + job.n * (1 + learnt) + job.d
        # Elsewhere than on a CPU the second would be another device's: the first steps tell.
        measured = device.type == "cpu" and can_measure(job)
        speed = measured_speed(job, chosen.kernel) if measured else None
        progress(
            Progress(
                f"k-SAE ({job.config.mode}, {job.config.activation}): d {job.d}, n {job.n:,}, "
                f"k {job.config.k}, {plural(job.rows, 'row')}\n"
                f"trains: W_enc, b_enc, W_dec, b_dec{thresholds}, {plural(count, 'parameter')}; frozen: "
                f"none\n{line(job, speed, behind)}"
            )
        )


def remarks(job: Job, kept: JoinedRows, held: JoinedRows) -> list[str]:
    """What the settings do to these rows that one may not expect."""
    found, seen = [], round((job.train.steps - 1) * job.train.batch_size * job.filled)
    shape = kept.parts[0].store.row_shape
    if len(shape) > 1 and not kept.cells:
        found.append(f"the store holds grids {shape}: a row is the mean over the places of one")
    if kept.cells:
        images = sum(len(part.images) for part in kept.parts)
        found.append(f"a row is a cell: {kept.group} of each of {plural(images, 'image')}")
    total = len(kept) + len(held)
    if (held_out := said(share_of(job.config), len(held), total)) is not None:
        found.append(held_out)
    found += _too_few(job)
    if job.config.auxk and seen < job.config.dead_after:
        found.append(
            f"auxk cannot act: {plural(seen, 'row is', 'rows are')} seen before the last step, and a latent "
            f"is dead after {job.config.dead_after:,} (dead_after)"
        )
    return found


def _too_few(job: Job) -> list[str]:
    """Where the steps are too few for the warm-up, or the rows for the latents; and what is usual."""
    found, train = [], job.train
    if train.warmup_steps > MOST_WARMUP * train.steps:
        usual = max(1, train.steps // 10)
        found.append(
            f"the learning rate rises over {train.warmup_steps:,} (warmup_steps) of "
            f"{plural(train.steps, 'step')}: a tenth is usual, set warmup_steps {usual:,}, or train longer"
        )
    if job.n > job.rows and job.config.expansion > LEAST_EXPANSION:
        fits = max(LEAST_EXPANSION, job.rows // job.d)
        found.append(
            f"{plural(job.n, 'latent')} for {plural(job.rows, 'row')}: many will be dead; fewer latents "
            f"than rows are usual, set expansion {fits}, or take more rows (images, or their cells)"
        )
    return found


def speed_of(job: Job, flops: float | None = None) -> Speed | None:
    """The time of a step, by a device's FLOP/s or measured here; None where a batch does not fit.

    Raises:
        ValueError: ``flops`` is not positive.
    """
    if flops is not None:
        return given_speed(job, flops)
    return (
        measured_speed(job, choose_kernel(job.config.kernel).kernel) if can_measure(job) else None
    )


def can_measure(job: Job) -> bool:
    """Whether some batches of the job's, which a measured step takes, fit the memory that is left."""
    available = available_memory()
    return available is None or 16 * 4 * job.local_rows * job.d < available


def shortage(jobs: Sequence[Job], out: Path, *, in_memory: bool) -> str | None:
    """What does not fit this machine when the jobs run together in each process; None where all fits.

    Args:
        jobs: k-SAEs of the same store.
        out: where they are written.
        in_memory: whether they train in this machine's own memory, not in an accelerator's.
    """
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


def device_shortage(jobs: Sequence[Job], room: int) -> str | None:
    """What a CUDA device of ``room`` free bytes lacks for k-SAEs that train together, and what would help."""
    need = devices_memory(jobs)
    if need <= room:
        return None
    said = f"this does not fit: it takes {size(need)} of the device's memory, of which {size(room)} are free"
    fits = smaller_batch(jobs, room)
    if len(jobs) > 1:
        return f"{said}: train fewer k-SAEs together (a smaller grid)"
    if fits:
        return f"{said}: take batch_size {fits}"
    return f"{said}: take a smaller expansion, or share the latents among several devices"


def ran_out(jobs: Sequence[Job], device: torch.device, room: int) -> str:
    """What to say of k-SAEs whose training went beyond a device's memory.

    Args:
        jobs: that trained together.
        device: where.
        room: bytes that it has free now that all of theirs are given back; 0: not known.
    """
    size_was = jobs[0].train.batch_size
    resume = "free memory that other programs hold and go on from the last checkpoint (resume)"
    said = f"the memory of {device} ran out at batch_size {size_was}"
    if not room:
        return f"{said}: train with a smaller one in another folder, or {resume}"
    # What CUDA takes for itself is taken already.
    need, fits = devices_memory(jobs) - CONTEXT_BYTES, smaller_batch(jobs, room + CONTEXT_BYTES)
    said += f" ({size(need)} are needed by an estimate, {size(room)} are free now)"
    if fits == size_was:
        return f"{said}: {resume}, or train with a smaller batch_size in another folder"
    smaller = "take a smaller expansion, or share the latents among several devices,"
    if fits:
        smaller = f"by the estimate batch_size {fits:d} fits: train with it"
    elif len(jobs) > 1:
        smaller = "train fewer k-SAEs together (a smaller grid),"
    return f"{said}: {smaller} in another folder; or {resume}"


def figures(job: Job, speed: Speed | None) -> dict[str, Any]:
    """The plan as plain values: bytes and seconds."""
    held, files = memory(job), disk(job)
    return {
        "job": {
            "rows": job.rows,
            "d": job.d,
            "n": job.n,
            "k": job.config.k,
            "batch_size": job.train.batch_size,
            "steps": job.train.steps,
            "devices": job.devices,
            "sharing": job.config.sharing,
            "held": job.held,
            "row_bytes": job.row_bytes,
            "checkpoints": job.config.checkpoint_every > 0,
            "local_latents": job.local_latents,
            "local_rows": job.local_rows,
        },
        "memory_of_a_process": asdict(held) | {"total": held.total},
        "seconds": None if speed is None else _seconds(job, speed),
        "disk": asdict(files) | {"written": files.written},
    }


def _seconds(job: Job, speed: Speed) -> dict[str, Any]:
    return {
        "step": speed.step,
        "step_slowest": speed.slowest,
        "total": job.train.steps * speed.step,
        "total_slowest": job.train.steps * speed.slowest,
        "rows_per_second": job.train.batch_size * job.filled / speed.step,
        "how": speed.how,
    }


def line(job: Job, speed: Speed | None, done: int = 0) -> str:
    """The plan in one line, of the steps after ``done``; without a speed it says nothing of time."""
    shared = f"{job.devices} processes share the {'batches' if job.config.sharing == 'data' else 'latents'}"
    where = f" a process ({shared})" if job.devices > 1 else ""
    behind = f" ({done:,} of them done)" if done else ""
    time = ""
    if speed is not None:
        left = max(0, job.train.steps - done)
        fast, slow = (duration(left * each) for each in (speed.step, speed.slowest))
        time = f", {fast} to {slow} ({speed.how})" if fast != slow else f", {fast} ({speed.how})"
    return (
        f"plan: {plural(job.train.steps, 'step')}{behind} of {plural(job.train.batch_size, 'row')}{time}; "
        f"memory {size(memory(job).total)}{where}{_there(available_memory(), 'available')}; "
        f"disk {size(disk(job).written)}"
    )


def _there(count: int | None, word: str) -> str:

    return "" if count is None else f" ({size(count)} {word})"


def table(job: Job, speed: Speed | None) -> str:
    """The plan as a table for people."""
    held, files = memory(job), disk(job)
    shared = "" if job.devices == 1 else f", {job.devices} devices share the {job.config.sharing}"
    entries = [
        ("k-SAE", f"d {job.d:,}, n {job.n:,}, k {job.config.k}{shared}"),
        ("data", f"{plural(job.rows, 'row')}, {plural(job.train.steps, 'step')} of {job.train.batch_size:,}"),
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
    return columns(entries)


def _times(job: Job, speed: Speed | None) -> list[tuple[str, str]]:

    if speed is None:
        return [("time", "not measured: a batch does not fit this machine")]
    fast, slow = speed.step, speed.slowest
    batch = job.train.batch_size * job.filled
    return [
        ("time of a step", f"{fast:.3g} to {slow:.3g} s ({speed.how})"),
        (
            "rows a second",
            f"{batch / slow:,.0f} to {batch / fast:,.0f}",
        ),
        ("time", f"{duration(job.train.steps * fast)} to {duration(job.train.steps * slow)}"),
    ]
