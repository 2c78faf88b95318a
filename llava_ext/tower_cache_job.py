"""Filling a tower cache (:mod:`llava_ext.tower_cache`): planned and measured, shared out, resumable.

Process r of W takes shards r, r + W, ... of the images; every picture is read once for all towers.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llava_ext.config import CacheConfig
from llava_ext.dataset import Opened, Pictures
from llava_ext.images import picture_ids, plain_ids
from llava_ext.llava_json import image_names, read_records
from llava_ext.tower_cache import DTYPE, FREE, row_shape, store_name, to_row
from llava_ext.towers import Tower, load_towers
from revelio.activations.format import write_shard
from revelio.activations.writer import CONTENTS, SHARD_CONTENTS, StoreWriter, check_same
from revelio.data.contents import combined
from revelio.distributed import Processes
from revelio.machine import duration, free_disk, size
from revelio.run_dir import versions

# What the rows of an open shard may take in memory, all towers together.
SHARD_BYTES = 64 * 2**20
SHARD_IMAGES = 1024


@dataclass(frozen=True)
class CacheJob:
    """Which grids of which images to keep where.

    Attributes:
        cache: the folder that gets a store a tower.
        towers: whose grids; equal ones are computed once.
        folder: of the images.
        names: of the images, in order.
        batch_size: images a pass of a tower.
        processes: this process and its like.
        workers: processes that read and resize pictures while the towers run.
    """

    cache: Path
    towers: Sequence[Tower]
    folder: Path
    names: Sequence[str]
    batch_size: int = 16
    processes: Processes = field(default_factory=Processes)
    workers: int = 0

    @cached_property
    def targets(self) -> list[tuple[Tower, StoreWriter]]:
        """The stores to make, one a tower.

        Raises:
            ValueError: two different towers would have one folder.
        """
        found: dict[str, tuple[Tower, StoreWriter]] = {}
        for tower in self.towers:
            name = store_name(tower.config)
            target = StoreWriter(self.cache / name, self._settings(tower))
            if found.setdefault(name, (tower, target))[1].settings != target.settings:
                raise ValueError(
                    f"two towers would share {self.cache / name}: cache them in two folders"
                )
        return list(found.values())

    def _settings(self, tower: Tower) -> dict[str, object]:
        pooled = tower.config.tokens == "pool"
        return {
            "kind": "activations",
            "layer": tower.config.layer,
            "model": tower.config.backbone,
            "pool": row_shape(tower)[1] if pooled else "none",
            "dtype": DTYPE,
            "tower": tower.identity(),
            "images": len(self.names),
            "dataset_sha256": self._names_sha256,
            **self._contents,
            "shard_images": self.shard_images,
            "made_with": versions(),
        }

    @cached_property
    def _names_sha256(self) -> str:
        """Of names and sizes, as the first version had it."""
        return hashlib.sha256("\n".join(plain_ids(self.folder, self.names)).encode()).hexdigest()

    @cached_property
    def ids(self) -> list[str]:
        """The id of each image; its contents are read for it, once."""
        return picture_ids(self.folder, self.names, self.cache)

    @cached_property
    def _contents(self) -> dict[str, object]:
        """Hashes of the pictures, of all and of each shard; only the main process compares."""
        if not self.processes.main:
            return {}
        step = self.shard_images
        parts = [self.ids[start : start + step] for start in range(0, len(self.ids), step)]
        return {
            CONTENTS: combined(self.ids),
            SHARD_CONTENTS: [combined(part)[:16] for part in parts],
        }

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of an image in all stores."""
        shapes = {store_name(tower.config): row_shape(tower) for tower in self.towers}
        return sum(2 * torch.Size(shape).numel() for shape in shapes.values())

    @cached_property
    def shard_images(self) -> int:
        """Images a shard, whole batches."""
        fits = min(SHARD_IMAGES, SHARD_BYTES // self.row_bytes)
        return max(1, fits // self.batch_size) * self.batch_size

    @cached_property
    def shards(self) -> list[Sequence[str]]:
        """The images of each shard."""
        step = self.shard_images
        return [self.names[start : start + step] for start in range(0, len(self.names), step)]

    def lacking(self) -> list[set[int]]:
        """The shards that each store lacks."""
        return [target.missing(len(self.shards)) for _, target in self.targets]

    @property
    def share(self) -> int:
        """Images left for this process."""
        numbers = set().union(*self.lacking())
        mine = (n for n in numbers if n % self.processes.world == self.processes.rank)
        return sum(len(self.shards[number]) for number in mine)

    def check(self) -> None:
        """See whether the stores may be made or gone on with; writes nothing.

        Only the main process looks: to the others its lock would be another run's.

        Raises:
            ValueError: one was made with other settings, or for other images.
        """
        if not self.processes.main:
            return
        for tower, target in self.targets:
            if target.started:
                was = target.written_settings().get("tower") or {}
                check_same(target.path, was, tower.identity(), free=FREE)
            target.check(resume=True)


def open_cache_job(config: CacheConfig, processes: Processes) -> CacheJob:
    """The job that the config describes, with its towers loaded.

    Raises:
        KeyError: an unknown backbone or layer.
        ValueError: the data or a setting is wrong.
    """
    if config.cache is None:
        raise ValueError("no folder for the cache: choose one (`cache`)")
    if config.batch_size < 1:
        raise ValueError(f"batch_size is {config.batch_size}: it must be at least 1")
    data = config.data
    records = read_records(data.json, data.images, limit=config.limit, bad=config.bad_records)
    names = image_names(records)
    if config.data.images is None or not names:
        raise ValueError(f"{config.data.json} has no images, so there is nothing to cache")
    towers = load_towers(config.model, processes.device)
    folder, batch = config.data.images, config.batch_size
    return CacheJob(config.cache, towers, folder, names, batch, processes, config.workers)


def plan(job: CacheJob) -> str:
    """The cost of what is left, as one line: measured on the first images, written nowhere.

    Raises:
        ValueError: the stores can't be made, or don't fit the disk.
    """
    job.check()
    numbers = sorted(set().union(*job.lacking()))
    todo = [name for number in numbers for name in job.shards[number]]
    if not todo:
        return f"plan: nothing left to do for {len(job.names):,} images in {job.cache}"
    some = todo[: job.batch_size]
    for pixels, ids in _opened(job, some[:1], workers=0):
        _compute(job, pixels, ids)
    started = time.perf_counter()
    for pixels, ids in _opened(job, some, workers=0):
        _compute(job, pixels, ids)
    rate = len(some) / (time.perf_counter() - started) * job.processes.world
    needed = len(todo) * job.row_bytes
    free = free_disk(job.cache) or 0
    if needed > free:
        raise ValueError(
            f"the cache takes {size(needed)}, but {size(free)} are free at {job.cache}: choose another "
            "folder, or `tokens: pool`"
        )
    return (
        f"plan: {len(todo):,} of {len(job.names):,} images, {len(job.targets)} towers, at "
        f"{rate:.3g} images/s in {job.processes.world} process"
        f"{'es' if job.processes.world > 1 else ''}: {duration(len(todo) / rate)}; "
        f"{size(needed)} ({size(free)} free)"
    )


def fill(job: CacheJob) -> Iterator[int]:
    """Compute what is left of this process's share; the manifests come last.

    Yields:
        How many images this process has done, after each batch.

    Raises:
        ValueError: as :meth:`CacheJob.check`; another process is filling it; a picture can't be
            read; a grid doesn't fit float16.
        OSError: a shard can't be written.
    """
    if not job.processes.main:
        yield from _fill(job)
        return
    job.check()
    locks = [target.begin() for _, target in job.targets]
    picture_ids(job.folder, job.names, job.cache, keep=True)
    try:
        yield from _fill(job)
        for _, target in job.targets:
            target.finish(len(job.shards))
    finally:
        for lock in filter(None, locks):
            lock.release()


def _fill(job: CacheJob) -> Iterator[int]:
    """Compute this process's share of the shards."""
    processes = job.processes
    processes.wait()
    done = 0
    lacking = job.lacking()
    numbers = sorted(set().union(*lacking))
    mine = [number for number in numbers if number % processes.world == processes.rank]
    opened = _opened(job, [name for number in mine for name in job.shards[number]])
    for number in mine:
        names = job.shards[number]
        parts = []
        # Shards but the last hold whole batches.
        for pixels, found in islice(opened, -(-len(names) // job.batch_size)):
            parts.append(_compute(job, pixels, found))
            done += len(parts[-1][0])
            yield done
        start = number * job.shard_images
        ids = job.ids[start : start + len(names)]
        columns = zip(job.targets, lacking, zip(*parts, strict=True), strict=True)
        for (_, target), missing, rows in columns:
            if number in missing:
                write_shard(target.path, number, torch.cat(rows), ids)
    processes.wait()


def _opened(
    job: CacheJob, names: Sequence[str], workers: int | None = None
) -> Iterator[tuple[tuple[Tensor, ...], list[str]]]:
    """Pixels for each store's tower, and the pictures' ids, a batch at a time, read ahead by workers."""
    pictures = Pictures(job.folder, [tower for tower, _ in job.targets])
    loader = DataLoader(
        Opened(pictures, names),
        batch_size=job.batch_size,
        num_workers=job.workers if workers is None else workers,
        collate_fn=pictures.stack,
    )
    return ((batch["pixels"], batch["image_ids"]) for batch in loader)


def _compute(job: CacheJob, pixels: Sequence[Tensor], ids: Sequence[str]) -> list[Tensor]:
    """The rows of a batch, one tensor a store."""
    with torch.inference_mode():
        pairs = zip(job.targets, pixels, strict=True)
        return [to_row(tower, tower.grids(each, ids)) for (tower, _), each in pairs]
