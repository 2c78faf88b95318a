"""The batch size that fits a device's memory: found by trying, from small to large.

What a batch takes grows at most in proportion to its size (weights and workspaces do not grow), so a size is
tried where twice what half of it took still fits with room to spare.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from revelio.activations.encode import Encoded, encode
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.data.loading import batches
from revelio.device_memory import not_one_fits, release
from revelio.device_memory import room as room_of
from revelio.machine import size as shown

# The sizes that `auto` chooses from: beyond the last a GPU gains nothing more.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The share of free memory that is used: the allocator's blocks have gaps.
USED = 0.9


@dataclass(frozen=True)
class Fit:
    """What was found by trying.

    Attributes:
        size: the largest batch that fits; 0: not even one image does.
        image_bytes: what one image of it took, beside the model; 0 where nothing counts memory.
        room: bytes that the device had for a batch; 0 likewise.
    """

    size: int
    image_bytes: int
    room: int


def largest_batch(job: ExtractionPlan, sizes: Sequence[int] = SIZES) -> Fit:
    """The largest of the ascending ``sizes`` whose batch fits; no batch is larger than the data set.

    Where memory is not counted (on a CPU) it is the largest that raises no error.

    Raises:
        ImageError: no image can be read.
    """
    index, pixels = _first_picture(job)
    first = encode(job.backbone, pixels)
    assert first is not None
    device, found = first.device, Fit(0, 0, room_of(first.device))
    del first
    for size in sizes:
        # A size that covers the data set is the last of use.
        covered = found.size >= len(job.dataset)
        if covered or found.image_bytes * size > USED * found.room:
            break
        try:
            peak, room = _peak(job, index, pixels, size, device)
        except torch.OutOfMemoryError as error:
            release(error)
            break
        found = Fit(size, peak // size, room)
    return found


def fitted(job: ExtractionPlan) -> ExtractionPlan:
    """The job at the largest batch size that fits, the same in all its processes.

    A store that was begun goes on at an even part of its own size, so that its shards stay as they are.

    Raises:
        ValueError: not even one image fits.
    """
    was = _begun(job) if job.resume else None
    sizes = SIZES if was is None else [*smaller_sizes(was[0]), was[0]]
    size = largest_batch(job, sizes).size if job.processes.main else 0
    shard_rows = (job.config.shard_rows if was is None else was[1]) or 0
    # Both are the main process's: by the time another looks, a begun store may have been opened again.
    size, shard_rows = job.processes.agree(size), job.processes.agree(shard_rows)
    if not size:
        raise too_large(job, None)
    return job.with_settings(batch_size=size, shard_rows=shard_rows or None)


def _begun(job: ExtractionPlan) -> tuple[int, int] | None:
    """The batch size and the images a shard of a store that was begun."""
    for target in job.targets.values():
        if target.started:
            was = target.written_settings()
            sizes = was.get("batch_size"), was.get("shard_images")
            if all(isinstance(size, int) and size > 0 for size in sizes):
                return sizes  # type: ignore[return-value]
    return None


def smaller_sizes(batch_size: int) -> list[int]:
    """Smaller batches that a begun store can be gone on with, ascending: its halves, and one image."""
    found, size = set[int](), batch_size
    while size > 1 and size % 2 == 0:
        size //= 2
        found.add(size)
    return sorted(found | {1} - {batch_size})


def too_large(job: ExtractionPlan, error: torch.OutOfMemoryError | None) -> ValueError:
    """What to say when a batch of ``job`` went beyond the device's memory: which size fits instead."""
    if error is not None:
        release(error)
    batch = job.batch_size
    fit = largest_batch(job, smaller_sizes(batch))
    if not fit.size:
        return not_one_fits(fit.room)
    takes = f" (about {shown(fit.image_bytes * batch)}; {shown(fit.room)} free)" if fit.room else ""
    settings = f"batch_size {fit.size}"
    smaller = job.with_settings(batch_size=fit.size)
    if smaller.shard_images != job.shard_images:
        settings += f" and shard_rows {job.shard_images}"
    return ValueError(
        f"batch_size {batch} goes beyond the device's memory{takes}: {fit.size} fits; whole shards stay: "
        f"resume with {settings}"
    )


def _first_picture(job: ExtractionPlan) -> tuple[int, Tensor]:
    for batch in batches(job.dataset, job.backbone.transform, 1, on_error=job.config.data.on_error):
        if len(batch):
            return batch.indices[0], batch.pixels
    raise ValueError(f"not one image of {job.dataset.name} can be read")


@torch.no_grad()
def _peak(
    job: ExtractionPlan, index: int, pixels: Tensor, size: int, device: torch.device
) -> tuple[int, int]:
    """Bytes that a batch of ``size`` takes beside the model, and those there are for it."""
    counted, before, room = device.type == "cuda", 0, room_of(device)
    if counted:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    encoded = encode(job.backbone, pixels.expand(size, -1, -1, -1).contiguous())
    one = job.config.passes()[0]
    job.rows(Encoded([index] * size, encoded, []), replace(one, draws=one.draws[:1]))
    return (torch.cuda.max_memory_allocated(device) - before if counted else 0), room
