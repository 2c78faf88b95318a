"""What an extraction will cost: images a second measured on the first images, GB, hours.

seconds = images to encode * encoding + passes that stores lack * pass, of the process that has the most
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from revelio.activations.encode import Encoded, FreshImages
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.fitting import too_large
from revelio.machine import duration, free_disk, size
from revelio.wording import plural

# An image slower than this is measured alone; a faster model is warmed up by it, then timed on a batch.
SLOW_SECONDS = 1.0

# Told how many measurements are done, and of how many.
Measured = Callable[[int, int], object]


@dataclass(frozen=True)
class Cost:
    """The cost of what is left to do.

    Attributes:
        images: how many images have something left to be made of them.
        encoded: how many of them are to be read and encoded; the others' latents are cached.
        passes: passes of the model over an image, of all images together.
        stores: how many stores are made.
        bytes_left: what is to be written.
        bytes_free: what the disk has room for; None where the system does not say.
        encode_seconds: reading and encoding one image; 0 where nothing is left or cached.
        pass_seconds: one pass of one image, all layers.
        loads: of each process that shares the work, its images to encode and its passes: whole shards.
    """

    images: int
    encoded: int
    passes: int
    stores: int
    bytes_left: int
    bytes_free: int | None
    encode_seconds: float = 0.0
    pass_seconds: float = 0.0
    loads: tuple[tuple[int, int], ...] = ()

    @property
    def seconds(self) -> float:
        """The whole, in seconds of wall time: those of the process that has the most to do."""
        each = (one * self.encode_seconds + other * self.pass_seconds for one, other in self.loads)
        return max(each, default=0.0)

    @property
    def images_per_second(self) -> float:
        """Images a second that come out with every store's row, all processes together."""
        return self.images / self.seconds if self.seconds else 0.0

    def shortage(self, out: Path) -> str | None:
        """What the disk of ``out`` lacks; None where everything fits."""
        if self.bytes_free is None or self.bytes_left <= self.bytes_free:
            return None
        return (
            f"the stores take {size(self.bytes_left)}, but {size(self.bytes_free)} are free at {out}: "
            "choose another folder, or a smaller pool, fewer cells or a shorter dtype"
        )

    def line(self) -> str:
        """The plan as one line for people."""
        if not self.images:
            return f"plan: nothing left to do for {plural(self.stores, 'store')}"
        free = "" if self.bytes_free is None else f" ({size(self.bytes_free)} free)"
        many, idle = len(self.loads), sum(not any(load) for load in self.loads)
        less = f" ({idle} of them without a shard: lower shard_rows)" if idle else ""
        return (
            f"plan: {plural(self.images, 'image')} ({self.encoded:,} to encode), "
            f"{plural(self.passes / self.images, 'pass', 'passes', '.3g')} each, "
            f"at {self.images_per_second:.3g} images/s in "
            f"{plural(many, 'process', 'processes')}{less}: {duration(self.seconds)}; "
            f"{plural(self.stores, 'store')}, {size(self.bytes_left)}{free}"
        )


def seconds_per_image(call: Callable[[int], Any], images: int, *, compiled: bool = False) -> float:
    """How long ``call(n)`` takes an image, after a first call that warms up.

    Args:
        call: does the work for ``n`` images and waits for the device to be done.
        images: the batch size to measure at.
        compiled: whether the first call of each size compiles for it, which is not to be counted.
    """
    if compiled:
        call(images)
        return _seconds(call, images) / images
    first = _seconds(call, 1)
    if first > SLOW_SECONDS and torch.cuda.is_available():
        # A first call on a GPU loads its libraries.
        first = _seconds(call, 1)
    if images == 1 or first > SLOW_SECONDS:
        return first
    return _seconds(call, images) / images


def _seconds(call: Callable[[int], Any], images: int) -> float:
    started = time.perf_counter()
    call(images)
    return time.perf_counter() - started


def estimate(job: ExtractionPlan, measured: Measured | None = None) -> Cost:
    """What is left of ``job`` and what it costs, measured on its first images; writes nothing.

    Args:
        job: the extraction.
        measured: told how many measurements are done, of how many: a single image of a large model, or at a
            large ``image_size``, takes minutes.

    Raises:
        ImageError: one of them can't be read and ``on_error`` is ``stop``.
        ValueError: a batch does not fit the device's memory.
    """
    job.check()
    lacking = job.lacking()
    todo = lacking.shards
    fresh = todo if job.cache is None else sorted(lacking.cache)

    def images(shards: Iterable[int]) -> int:
        return sum(len(job.spans[number]) for number in shards)

    world = job.processes.world

    def load(wanted: Callable[[int], bool]) -> tuple[int, int]:
        """Images to encode and passes in some shards."""
        passes = lacking.passes().items()
        return images(filter(wanted, fresh)), sum(
            len(one.draws) * images(filter(wanted, some)) for one, some in passes
        )

    # The same shards as in revelio.activations.extract.
    loads = tuple(load(lambda n, rank=rank: n % world == rank) for rank in range(world))
    found = Cost(
        images=images(todo),
        encoded=sum(encoded for encoded, _ in loads),
        passes=sum(passes for _, passes in loads),
        stores=len(job.targets),
        bytes_left=sum(
            images(some) * job.row_bytes(layer) for (_, layer), some in lacking.stores.items()
        ),
        bytes_free=free_disk(job.out),
        loads=loads,
    )
    if todo:
        try:
            found = _measured(job, found, (fresh or todo)[0], measured or _unheard)
        except torch.OutOfMemoryError as error:
            raise too_large(job, error) from error
    return found


def _unheard(done: int, total: int) -> None:
    """Tell nobody."""


def _measured(job: ExtractionPlan, found: Cost, number: int, told: Measured) -> Cost:
    """The plan with times: of encoding and of one pass, for the first images of shard ``number``."""
    span, held = job.spans[number], list[Encoded]()

    def encode_some(count: int) -> None:
        some = span[:count]
        on_error = job.config.data.on_error
        fresh = FreshImages(job.dataset, job.backbone, [some], batch_size=count, on_error=on_error)
        batch = next(fresh.shard(some))
        # A copy to the CPU waits for the device.
        held[:] = [] if batch.encoded is None else [replace(batch, encoded=batch.encoded.cpu())]

    def pass_some(count: int) -> None:
        first = held[0]
        assert first.encoded is not None
        part = Encoded(first.indices[:count], first.encoded[:count], [])
        job.rows(part, replace(one, draws=one.draws[:1]))

    one = job.config.passes()[0]
    count = min(job.batch_size, len(span))
    compiled = bool(job.provenance.get("compile"))
    told(0, 2)
    if found.encoded:
        found = replace(
            found, encode_seconds=seconds_per_image(encode_some, count, compiled=compiled)
        )
    elif job.cache is not None:
        held[:] = [next(job.cache.shard(number, span, job.batch_size))]
    told(1, 2)
    if held and held[0].encoded is not None:
        latents = held[0].encoded[0].numel() * 2 if job.cache is not None else 0
        count = min(count, len(held[0].indices))
        found = replace(
            found,
            pass_seconds=seconds_per_image(pass_some, count, compiled=compiled),
            bytes_left=found.bytes_left + latents * found.encoded,
        )
    told(2, 2)
    return found
