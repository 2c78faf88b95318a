"""Filling shards: a batch of encoded images -> passes of the model -> rows of every store."""

from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from revelio.activations.job import Extraction, Lacking
from revelio.activations.recipe import Pass
from revelio.activations.shard import DTYPES, shard_name, write_shard
from revelio.activations.sources import Encoded
from revelio.files import DiskFull


class OpenShard:
    """One shard of every store that lacks it, while its batches come in."""

    def __init__(self, job: Extraction, lacking: Lacking, number: int) -> None:
        self._job = job
        self._number = number
        self._keys = [key for key, missing in lacking.stores.items() if number in missing]
        self._passes = list(dict.fromkeys(one for one, _ in self._keys))
        self._rows: dict[tuple[Pass, str], list[Tensor]] = {key: [] for key in self._keys}
        self._latents: list[Tensor] = []
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
            self._latents.append(batch.encoded.cpu())
        for one in self._passes:
            for layer, rows in pass_rows(self._job, batch, one).items():
                if (one, layer) in self._rows:
                    self._rows[one, layer].append(rows)

    def write(self) -> None:
        """Write the shard of every store; each is whole or absent."""
        if self._caches and self._job.cache is not None:
            self._write(self._job.cache.path, self._latents)
        for key in self._keys:
            self._write(self._job.targets[key].path, self._rows[key])

    def _write(self, folder: Path, parts: list[Tensor]) -> None:
        dataset = self._job.dataset
        rows = torch.cat(parts).cpu() if parts else torch.empty(0)
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
            )
        except DiskFull:
            raise
        except OSError as error:
            raise OSError(
                f"can't write {folder / shard_name(self._number)}: {error.strerror or error}; "
                "whole shards stay: make room and go on with --resume"
            ) from error


@torch.no_grad()
def pass_rows(job: Extraction, batch: Encoded, one: Pass) -> dict[str, Shaped[Tensor, "b ..."]]:
    """The rows of one batch at one (timestep, prompt, draws), by layer.

    Pooled rows stay where they were computed until the shard is written, so that a CUDA device is not waited
    for; whole grids are moved to the CPU.
    """
    assert batch.encoded is not None
    sums: dict[str, Tensor] = {}
    for draw in one.draws:
        grids = job.backbone.activations(
            batch.encoded,
            [job.dataset.ids[index] for index in batch.indices],
            job.recipe.layers,
            timestep=one.timestep,
            prompts=job.texts[one.prompt](batch.indices) if one.prompt in job.texts else None,
            seed=job.recipe.seed,
            draw=draw,
        )
        for layer, grid in grids.items():
            rows = job.recipe.pooled(grid)
            sums[layer] = sums[layer] + rows if layer in sums else rows
    stored = {}
    for layer, rows in sums.items():
        mean = (rows / len(one.draws)).to(DTYPES[job.recipe.dtype])
        stored[layer] = mean if mean.ndim == 2 else mean.cpu()
    return stored
