"""Filling a tower cache (:mod:`llava_ext.tower_cache`): planned and measured, shared out, resumable.

Process r of W takes shards r, r + W, ... of the images; every picture is read once for all towers.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llava_ext.config import CacheConfig, Keep
from llava_ext.dataset import Opened, Pictures
from llava_ext.images import damaged, picture_ids, plain_ids
from llava_ext.llava_json import image_names, read_records
from llava_ext.reading import Careful, CarefulCollator, raised
from llava_ext.tower_cache import FREE, write_stamp
from llava_ext.tower_rows import KeptTower
from llava_ext.towers import Tower, load_towers
from revelio.activations.format import write_shard
from revelio.activations.writer import CONTENTS, SHARD_CONTENTS, StoreWriter, check_same
from revelio.data.contents import combined
from revelio.distributed import Processes
from revelio.machine import duration, free_disk, size
from revelio.run_dir import versions
from revelio.wording import plural

# What the rows of an open shard may take in memory, all towers together.
SHARD_BYTES = 64 * 2**20
SHARD_IMAGES = 1024


@dataclass(frozen=True)
class CacheJob:
    """Which grids of which images to keep where.

    Attributes:
        cache: the folder that gets a store a tower.
        towers: whose grids; equal ones are computed once.
        keep: what is kept of an image.
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
    keep: Keep = "grids"

    @cached_property
    def kept(self) -> list[KeptTower]:
        """The towers by what is kept of them, each once.

        Raises:
            ValueError: of one that can't be kept.
        """
        return list({kept.name: kept for kept in self._all_kept}.values())

    @cached_property
    def _all_kept(self) -> list[KeptTower]:
        return [KeptTower(tower, self.keep) for tower in self.towers]

    @cached_property
    def targets(self) -> list[tuple[KeptTower, StoreWriter]]:
        """The stores to make, one a tower.

        Raises:
            ValueError: two different towers would have one folder.
        """
        found: dict[str, tuple[KeptTower, StoreWriter]] = {}
        for kept in self._all_kept:
            target = StoreWriter(self.cache / kept.name, self._settings(kept))
            if found.setdefault(kept.name, (kept, target))[1].settings != target.settings:
                raise ValueError(
                    f"two towers would share {self.cache / kept.name}: cache them in two folders"
                )
        return list(found.values())

    def _settings(self, kept: KeptTower) -> dict[str, object]:
        packed = {} if kept.keep == "grids" else {"keep": kept.keep}
        return {
            "kind": "activations",
            "layer": kept.config.layer,
            "model": kept.config.backbone,
            "pool": kept.pool,
            "dtype": kept.dtype,
            **packed,
            "tower": kept.identity(),
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
        return sum(kept.row_bytes for kept in self.kept)

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
    def shares(self) -> list[int]:
        """Images left for each process, which are given whole shards."""
        found = [0] * self.processes.world
        for number in set().union(*self.lacking()):
            found[number % len(found)] += len(self.shards[number])
        return found

    @property
    def share(self) -> int:
        """Images left for this process."""
        return self.shares[self.processes.rank]

    def check(self) -> None:
        """See whether the stores may be made or gone on with; writes nothing.

        Only the main process looks: to the others its lock would be another run's.

        Raises:
            ValueError: one was made with other settings, or for other images.
        """
        if not self.processes.main:
            return
        for kept, target in self.targets:
            if target.started:
                was = target.written_settings().get("tower") or {}
                check_same(target.path, was, kept.identity(), free=FREE)
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

    def decode(folder: Path, names: Sequence[str]) -> dict[str, str]:
        """By the main process, for all."""
        assert config.cache is not None
        found = damaged(folder, names, config.cache) if processes.main else {}
        return dict(processes.gather(list(found.items())))

    records = read_records(
        data.json, data.images, limit=config.limit, bad=config.bad_records, decode=decode
    )
    names = image_names(records)
    if config.data.images is None or not names:
        raise ValueError(f"{config.data.json} has no images, so there is nothing to cache")
    towers = load_towers(config.model, processes.device)
    folder, batch = config.data.images, config.batch_size
    return CacheJob(
        config.cache, towers, folder, names, batch, processes, config.workers, config.keep
    )


def plan(job: CacheJob) -> str:
    """The cost of what is left by each choice of what is kept, measured on the first images.

    Nothing is written. ``int8`` takes the time of ``grids``.

    Raises:
        ValueError: the stores can't be made, or don't fit the disk.
    """
    job.check()
    numbers = sorted(set().union(*job.lacking()))
    todo = [name for number in numbers for name in job.shards[number]]
    if not todo:
        return f"plan: nothing left to do for {plural(len(job.names), 'image')} in {job.cache}"
    free, count = free_disk(job.cache) or 0, job.processes.world
    sizes = {other.keep: len(todo) * other.row_bytes for other in _choices(job)}
    if sizes[job.keep] > free:
        others = (f"`keep: {keep}` takes {size(needed)}" for keep, needed in sizes.items())
        raise ValueError(
            f"the cache takes {size(sizes[job.keep])}, but {size(free)} are free at {job.cache}: choose "
            f"another folder, `tokens: pool`, or less to keep ({', '.join(others)})"
        )
    shares = job.shares
    idle = f" ({shares.count(0)} of them without a shard)" if 0 in shares else ""
    lines = [
        f"plan: {len(todo):,} of {plural(len(job.names), 'image')}, {plural(len(job.targets), 'tower')}, "
        f"{plural(count, 'process', 'processes')}{idle}; {size(free)} free at {job.cache}; in training"
    ]
    rates: dict[bool, float] = {}
    for other in _choices(job):
        runs = other.keep == "latents"
        if runs not in rates:
            # All wait for the one that has the most.
            rates[runs] = _rate(other, todo[: job.batch_size]) * len(todo) / max(shares)
        lines.append(
            f"{'->' if other.keep == job.keep else '':>4} {other.keep:8}{size(sizes[other.keep]):>10}, "
            f"{duration(len(todo) / rates[runs])} at {rates[runs]:.3g} images/s; "
            + ("the towers run on from them" if runs else "no tower runs")
        )
    return "\n".join(lines)


def _choices(job: CacheJob) -> Iterator[CacheJob]:
    """The job for everything that can be kept of its towers."""
    for keep in get_args(Keep):
        other = replace(job, keep=keep)
        try:
            other.kept  # noqa: B018
        except ValueError:
            continue
        yield other


def _rate(job: CacheJob, names: Sequence[str]) -> float:
    """Images a second."""
    for pixels, ids in _opened(job, names[:1], workers=0):
        _compute(job, pixels, ids)
    started = time.perf_counter()
    for pixels, ids in _opened(job, names, workers=0):
        _compute(job, pixels, ids)
    return len(names) / (time.perf_counter() - started)


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
        for kept, target in job.targets:
            target.finish(len(job.shards))
            write_stamp(job.cache, kept.name)
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
    pictures = Pictures(job.folder, job.kept)
    loader = DataLoader(
        Careful(Opened(pictures, names)),
        batch_size=job.batch_size,
        num_workers=job.workers if workers is None else workers,
        collate_fn=CarefulCollator(pictures.stack),
    )
    return ((batch["pixels"], batch["image_ids"]) for batch in map(raised, loader))


def _compute(job: CacheJob, pixels: Sequence[Tensor], ids: Sequence[str]) -> list[Tensor]:
    """The rows of a batch, one tensor a store."""
    with torch.inference_mode():
        return [kept.rows(each, ids) for kept, each in zip(job.kept, pixels, strict=True)]
