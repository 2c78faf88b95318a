"""Images -> activation stores: several layers, timesteps, prompts and draws in one run.

Each batch is encoded once (VAE); each (timestep, prompt, draw) is one pass of the model that yields all
layers. An interrupted run continues to the same bytes; process r of W takes shards r, r + W, ...
(the paper's Sec. 3.1; what the released code does instead: SPEC 1.1, 1.2, K4, K14-K17).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from revelio.activations.filling import OpenShard
from revelio.activations.fitting import too_large
from revelio.activations.job import Extraction, Texts
from revelio.activations.recipe import Pool, Recipe
from revelio.activations.sources import Encoded, FreshImages, Reading
from revelio.backbones.base import Backbone
from revelio.data.dataset import ImageDataset


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a batch, in this process.

    Attributes:
        images: how many of its images are done, skipped ones included.
        total: how many it has to do.
        skipped: how many could not be read so far.
    """

    images: int
    total: int
    skipped: int


def extract(
    dataset: ImageDataset,
    backbone: Backbone,
    out: Path,
    *,
    layers: Sequence[str],
    timesteps: Sequence[int] = (),
    prompts: Sequence[str] = ("empty",),
    texts: Mapping[str, Texts] | None = None,
    draws: int = 1,
    average_draws: bool = False,
    seed: int = 0,
    pool: Pool = "mean",
    dtype: str = "float32",
    batch_size: int = 16,
    workers: int = 0,
    on_error: Literal["stop", "skip"] = "stop",
    shard_rows: int | None = None,
    latents: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> list[Path]:
    """Run a whole extraction in this process.

    The arguments are those of :class:`Recipe`, :class:`Reading` and :class:`Extraction`, which see;
    a caller that wants a plan first, or to watch, makes an :class:`Extraction` and loops over :func:`run`.

    Returns:
        The folders of the stores: for each timestep, prompt and draw those of all layers.

    Raises:
        KeyError: an unknown layer.
        ValueError: a setting can't be, a store is there already, or was made with other settings.
        ImageError: an image can't be read and ``on_error`` is ``stop``.
        OSError: a shard can't be written.
    """
    recipe = Recipe(
        tuple(layers), tuple(timesteps), tuple(prompts), draws, average_draws, seed, pool, dtype
    )
    job = Extraction(
        dataset,
        backbone,
        out,
        recipe,
        texts=texts or {},
        reading=Reading(batch_size, workers, on_error),
        shard_rows=shard_rows,
        latents=latents,
        provenance=provenance or {},
        resume=resume,
    )
    for _ in run(job):
        pass
    return job.stores


def run(job: Extraction) -> Iterator[Progress]:
    """Make the stores of ``job``, one shard after another; the manifests come last.

    Yields:
        Where this process stands, after each batch.

    Raises:
        ImageError: an image can't be read and ``on_error`` is ``stop``; the shards before it stay.
        ValueError: see :meth:`Extraction.check`; activations don't fit the stored dtype; or a batch doesn't
            fit the device's memory: the message names a size that does.
        OSError: a shard can't be written; the shards before it stay.
    """
    if not job.processes.main:
        yield from _fill(job)
        return
    job.check()
    locks = job.begin()
    try:
        yield from _fill(job)
        job.finish()
    finally:
        for lock in locks:
            lock.release()


def _fill(job: Extraction) -> Iterator[Progress]:
    """Make this process's share of the shards."""
    processes, cache = job.processes, job.cache
    processes.wait()
    lacking = job.lacking()
    mine = [n for n in lacking.shards if n % processes.world == processes.rank]
    uncached = [n for n in mine if cache is None or n in lacking.cache]
    fresh = FreshImages(job.dataset, job.backbone, [job.spans[n] for n in uncached], job.reading)
    total, images, skipped = sum(len(job.spans[n]) for n in mine), 0, 0
    try:
        for number in mine:
            shard = OpenShard(job, lacking, number)
            for batch in _encoded(job, fresh if number in uncached else None, number):
                shard.add(batch)
                images += len(batch.indices) + len(batch.skipped)
                skipped += len(batch.skipped)
                yield Progress(images, total, skipped)
            shard.write()
    except torch.OutOfMemoryError as error:
        raise too_large(job, error) from error
    processes.wait()


def _encoded(job: Extraction, fresh: FreshImages | None, number: int) -> Iterator[Encoded]:
    """The batches of a shard, out of the cache where the images need not be read."""
    if fresh is not None:
        return fresh.shard(job.spans[number])
    assert job.cache is not None
    return job.cache.shard(number, job.spans[number], job.reading.batch_size)
