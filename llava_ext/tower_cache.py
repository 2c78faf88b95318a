"""Frozen-tower grids of a data set, computed once: training then runs no vision tower.

One activation store (``revelio/activations/FORMAT.md``) a tower in ``<cache>/<backbone>-<layer>...``; a row
is an image's grid in float16, averaged to the tower's budget where its tokens are ``pool``. A row's id names
the image and what it holds (:mod:`llava_ext.images`). The manifest's ``tower`` holds the tower's identity
(settings, processor, aspect, hash of its weights); a cache of another identity, or that lacks an image, is an
error. Filling is planned and resumable: process r of W takes shards r, r + W, ... of the images;
every picture is read once for all towers.
"""

import hashlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader

from llava_ext.config import QUESTION, CacheConfig, TowerConfig
from llava_ext.dataset import Opened, Pictures
from llava_ext.images import picture_ids, plain_ids
from llava_ext.llava_json import image_names, read_records
from llava_ext.towers import Tower, load_towers
from revelio.activations.format import write_shard
from revelio.activations.manifest import MANIFEST
from revelio.activations.store import ActivationStore
from revelio.activations.writer import CONTENTS, SHARD_CONTENTS, StoreWriter, check_same
from revelio.data.contents import combined
from revelio.distributed import Processes
from revelio.machine import duration, free_disk, size
from revelio.run_dir import versions
from revelio.trust import printable

DTYPE = "float16"
# Caches up to this size are read into memory, larger ones row by row from disk.
IN_MEMORY = 2 * 10**9
# How a tower was called doesn't matter: its weights are hashed.
FREE = {"backbone", "revision"}
MAKE = "make it with `revelio llava cache`"
# What the rows of an open shard may take in memory, all towers together.
SHARD_BYTES = 64 * 2**20
SHARD_IMAGES = 1024


def store_name(config: TowerConfig) -> str:
    """The folder of a tower's store inside a cache.

    Raises:
        ValueError: its grids depend on more than the picture.
    """
    if config.prompt == QUESTION:
        raise ValueError(
            f"tower {config.backbone} {config.layer} is prompted by the question, so a picture's grid "
            "differs with what is asked: train without a cache"
        )
    parts = [config.backbone.rstrip("/").rpartition("/")[2].replace(":", "-"), config.layer]
    if config.timestep is not None:
        parts += [f"t{config.timestep}", f"d{config.draw}"]
    if config.timesteps:
        parts += [f"t{'-'.join(map(str, config.timesteps))}", f"d{config.draw}"]
    if config.tokens == "pool":
        parts.append(f"pool{isqrt(config.budget)}")
    return "-".join(parts)


def row_shape(tower: Tower) -> tuple[int, int, int]:
    """Channels, height and width of a cached grid."""
    side = isqrt(tower.config.budget)
    pooled = tower.config.tokens == "pool"
    return (tower.channels, side, side) if pooled else (tower.channels, *tower.grid)


def to_row(tower: Tower, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i c y x"]:
    """Grids as they are kept: averaged for ``pool``, in float16.

    Raises:
        ValueError: a value doesn't fit float16.
    """
    shape = row_shape(tower)[1:]
    kept = adaptive_avg_pool2d(grids.float(), shape) if grids.shape[-2:] != shape else grids
    rows = kept.to(torch.float16)
    if not torch.isfinite(rows).all():
        largest = kept.abs().max().item()
        raise ValueError(
            f"tower {tower.config.backbone} {tower.config.layer} gives values up to {largest:.3g}, "
            "which float16 can't hold: train without a cache"
        )
    return rows.cpu()


class CachedGrids:
    """The cached grids of all towers, as the data set's ``ImageProvider``; make one with :meth:`open`."""

    def __init__(self, stores: Sequence[ActivationStore], rows: Sequence[Mapping[str, int]]):
        self.stores = tuple(stores)
        self._rows = tuple(rows)
        small = sum(_bytes(store) for store in stores) <= IN_MEMORY
        self._held = tuple(store.rows(0, len(store)) for store in stores) if small else None

    @classmethod
    def open(
        cls, cache: Path, towers: Sequence[Tower], folder: Path | None, names: Sequence[str]
    ) -> "CachedGrids":
        """Open the cache of these towers and see that it holds these images.

        Args:
            cache: the folder that `revelio llava cache` made.
            towers: compared by identity; none is run.
            folder: of the images; None where they are not here: then rows are found by the images' names, and
                whether a picture has changed since can't be told.
            names: the images that will be asked for.

        Raises:
            ValueError: a store is missing or unfinished, is of another tower, or lacks an image.
        """
        stores = [open_store(cache, tower) for tower in towers]
        if folder is None:
            named = [{one.split("|")[0]: one for one in store.ids} for store in stores]
            found = [[ids.get(name, name) for name in names] for ids in named]
            pairs = zip(stores, found, strict=True)
            return cls(stores, [_row_numbers(store, names, ids, ids) for store, ids in pairs])
        ids, plain = picture_ids(folder, names, cache), plain_ids(folder, names)
        return cls(stores, [_row_numbers(store, names, ids, plain) for store in stores])

    def get(self, name: str) -> tuple[Tensor, ...]:
        """One grid (c h w) a tower."""
        numbers = [rows[name] for rows in self._rows]
        if self._held is not None:
            return tuple(held[number] for held, number in zip(self._held, numbers, strict=True))
        pairs = zip(self.stores, numbers, strict=True)
        return tuple(store.rows(number, number + 1)[0] for store, number in pairs)

    def stack(self, images: Sequence[tuple[Tensor, ...]]) -> Mapping[str, Any]:
        """``grids``: one tensor (i c h w) a tower, i = 0 where there are no images."""
        if not images:
            empty = (torch.empty(0, *store.row_shape) for store in self.stores)
            return {"grids": tuple(empty)}
        return {"grids": tuple(torch.stack(column) for column in zip(*images, strict=True))}


def _row_numbers(
    store: ActivationStore, names: Sequence[str], ids: Sequence[str], plain: Sequence[str]
) -> dict[str, int]:
    """The row of each image by name.

    Raises:
        ValueError: the store lacks one, or holds it as it was before it changed.
    """
    found = {identity: number for number, identity in enumerate(store.ids)}
    rows: dict[str, int] = {}
    for name, identity, old in zip(names, ids, plain, strict=True):
        row = found.get(identity, found.get(old))
        if row is None:
            raise ValueError(
                f"{store.path} lacks image {printable(name)}, or holds it as it was before it "
                f"changed: {MAKE} in another folder"
            )
        rows[name] = row
    if any(identity not in found for identity in ids):
        warnings.warn(
            f"{store.path} is of a version that knew pictures by name and size only: if one was edited "
            f"since, {MAKE} in another folder",
            stacklevel=3,
        )
    return rows


def open_store(cache: Path, tower: Tower) -> ActivationStore:
    """The finished store of a tower, after its identity was compared.

    Raises:
        ValueError: it is missing or unfinished, or was made by another tower or with other settings.
    """
    path = cache / store_name(tower.config)
    if not (path / MANIFEST).is_file():
        raise ValueError(f"no finished cache at {path}: {MAKE}")
    store = ActivationStore.open(path)
    was = store.manifest.get("tower")
    if not isinstance(was, Mapping):
        raise ValueError(f"{path} is a store of another kind, not a tower's cache: {MAKE}")
    check_same(path, was, tower.identity(), free=FREE)
    if store.row_shape != row_shape(tower):
        raise ValueError(
            f"{path} holds grids of {store.row_shape}, the config asks for {row_shape(tower)}: {MAKE}"
        )
    return store


def _bytes(store: ActivationStore) -> int:
    return sum(shard["bytes"] for shard in store.manifest["shards"])


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
