"""Images -> activation stores: several layers, timesteps, prompts and draws in one run.

Each batch is encoded once (VAE); each (timestep, prompt, draw) is one pass of the model that yields all
layers. An interrupted run continues to the same bytes; process r of W takes shards r, r + W, ...
(the paper's Sec. 3.1; what the released code does instead: SPEC 1.1, 1.2, K4, K14-K17).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from revelio.activations.config import ExtractConfig, ForwardPass
from revelio.activations.encode import Encoded, FreshImages
from revelio.activations.extraction_plan import ExtractionPlan, Lacking, Rows, Texts
from revelio.activations.fitting import too_large
from revelio.activations.format import Cells, shard_name, write_shard
from revelio.backbones.base import Backbone
from revelio.data.config import DataConfig
from revelio.data.dataset import ImageDataset
from revelio.disk import DiskFull
from revelio.distributed import Processes


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
    out: str | Path,
    *,
    layers: Sequence[str],
    timesteps: Sequence[int] = (),
    prompts: Sequence[str] = ("empty",),
    texts: Mapping[str, Texts] | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    provenance: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: Callable[[Progress], Any] | None = None,
    processes: Processes | None = None,
    **settings: Any,
) -> list[Path]:
    """Extract from a data set and a backbone that are open.

    Opening them by a config, and a plan beforehand: :mod:`revelio.pipelines.extract`.

    Args:
        dataset: the images.
        backbone: the model.
        out: the folder that gets a store for each layer and pass.
        layers: names out of ``backbone.layers``.
        timesteps: the model's own training indices; none for a model without noise.
        prompts: prompt policies.
        texts: for each policy but ``empty``, the texts of the images at given indices.
        on_error: ``stop`` or ``skip`` at an unreadable image.
        provenance: further manifest fields (revision, compute_dtype, mode, ...).
        resume: go on with stores that are there, of the same settings, and take finished ones as they are:
            the same call may be repeated.
        progress: called after each batch with where it stands.
        processes: those that share the shards, which all make this call; None: this one alone.
        settings: further fields of :class:`ExtractConfig` (draws, pool, store_dtype, seed, vae_cache, ...).

    Returns:
        The folders of the stores: for each timestep, prompt and draw those of all layers.

    Raises:
        KeyError: an unknown layer.
        ValueError: a setting can't be, a store is there already, or was made with other settings.
        ImageError: an image can't be read and ``on_error`` is ``stop``.
        OSError: a shard can't be written.
    """
    settings |= {"layers": tuple(layers), "timesteps": tuple(timesteps), "prompts": tuple(prompts)}
    config = ExtractConfig(**settings, data=DataConfig(on_error=on_error))
    rest = (texts or {}, provenance or {}, resume, processes or Processes())
    job = ExtractionPlan(dataset, backbone, Path(out), config, *rest)
    for step in run(job):
        if progress is not None:
            progress(step)
    return job.stores


def run(job: ExtractionPlan) -> Iterator[Progress]:
    """Make the stores of ``job``, one shard after another; the manifests come last.

    Yields:
        Where this process stands, after each batch.

    Raises:
        ImageError: an image can't be read and ``on_error`` is ``stop``; the shards before it stay.
        ValueError: see :meth:`ExtractionPlan.check`; activations don't fit the stored dtype; or a batch
            doesn't fit the device's memory: the message names a size that does.
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


def _fill(job: ExtractionPlan) -> Iterator[Progress]:
    """Make this process's share of the shards."""
    processes, cache = job.processes, job.cache
    processes.wait()
    lacking = job.lacking()
    mine = [n for n in lacking.shards if n % processes.world == processes.rank]
    uncached = [n for n in mine if cache is None or n in lacking.cache]
    fresh = FreshImages(
        job.dataset,
        job.backbone,
        [job.spans[n] for n in uncached],
        batch_size=job.batch_size,
        workers=job.workers,
        on_error=job.config.data.on_error,
    )
    total, images, skipped = sum(len(job.spans[n]) for n in mine), 0, 0
    try:
        for number in mine:
            shard = _OpenShard(job, lacking, number)
            for batch in _encoded(job, fresh if number in uncached else None, number):
                shard.add(batch)
                images += len(batch.indices) + len(batch.skipped)
                skipped += len(batch.skipped)
                yield Progress(images, total, skipped)
            shard.write()
    except torch.OutOfMemoryError as error:
        raise too_large(job, error) from error
    processes.wait()


def _encoded(job: ExtractionPlan, fresh: FreshImages | None, number: int) -> Iterator[Encoded]:
    """The batches of a shard, out of the cache where the images need not be read."""
    if fresh is not None:
        return fresh.shard(job.spans[number])
    assert job.cache is not None
    return job.cache.shard(number, job.spans[number], job.batch_size)


class _OpenShard:
    """One shard of every store that lacks it, while its batches come in."""

    def __init__(self, job: ExtractionPlan, lacking: Lacking, number: int) -> None:
        self._job = job
        self._number = number
        self._keys = [key for key, missing in lacking.stores.items() if number in missing]
        self._passes = list(dict.fromkeys(one for one, _ in self._keys))
        self._rows: dict[tuple[ForwardPass, str], list[Rows]] = {key: [] for key in self._keys}
        self._latents: list[Rows] = []
        self._indices: list[int] = []
        self._skipped: list[tuple[str, str]] = []
        self._caches = number in lacking.cache

    def add(self, batch: Encoded) -> None:
        """Take a batch through every pass that a store lacks."""
        self._indices += batch.indices
        self._skipped += batch.skipped
        if batch.encoded is None:
            return
        if self._caches:
            self._latents.append(Rows(batch.encoded.cpu(), None))
        for one in self._passes:
            for layer, rows in self._job.rows(batch, one).items():
                if (one, layer) in self._rows:
                    self._rows[one, layer].append(rows)

    def write(self) -> None:
        """Write the shard of every store; each is whole or absent."""
        if self._caches and self._job.cache is not None:
            self._write(self._job.cache.path, self._latents)
        for key in self._keys:
            self._write(self._job.targets[key].path, self._rows[key])

    def _write(self, folder: Path, parts: list[Rows]) -> None:
        dataset = self._job.dataset
        rows = torch.cat([part.values for part in parts]).cpu() if parts else torch.empty(0)
        found = [part.cells for part in parts if part.cells is not None]
        places = torch.cat([one.places for one in found]) if found else None
        if not rows.isfinite().all():
            raise ValueError(
                f"activations of {folder.name} are not finite in {str(rows.dtype)[6:]}: "
                "store (and compute) in bfloat16 or float32"
            )
        labels = dataset.labels
        try:
            write_shard(
                folder,
                self._number,
                rows,
                [dataset.ids[i] for i in self._indices],
                None if labels is None else [labels[i] for i in self._indices],
                self._skipped,
                None if places is None else Cells(places, found[0].grid),
            )
        except DiskFull:
            raise
        except OSError as error:
            raise OSError(
                f"can't write {folder / shard_name(self._number)}: {error.strerror or error}; "
                "whole shards stay: make room and go on with resume"
            ) from error
