"""The top images of every latent, streamed: what each latent of a k-SAE responds to.

For latent j over the images i with codes z_ij: the m largest z_ij > 0 with their rows, how many images
have z_ij > 0 (density), and the mean of those (strength). Sec. 4.2 reads purity off these; the released
code took ReLU of the pre-activations before TopK (`codes="dense"`), the paper's "activated" latents are
the TopK codes (`codes="sparse"`). Larger values come first; ties go to the lower row.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.analysis.cells import encode_cells, image_codes
from revelio.analysis.config import OverCells, TopImagesConfig
from revelio.bounds import check_fields
from revelio.sae.inputs import trained_stores
from revelio.sae.kernels.base import Codes
from revelio.sae.metrics import density_histogram
from revelio.trust import printable
from revelio.wording import plural

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

# Where a store's activations were taken, and how.
PLACE, SETTING = ("model", "layer"), ("timestep", "prompt_policy")
MIN_IMAGES = 10
"""A latent counts as active when more images than this have a code > 0 (released code)."""


@dataclass(frozen=True)
class TopImages:
    """The top images of n latents over a store of N images.

    Attributes:
        values: the largest codes of each latent, descending; 0 where fewer than m images have a code > 0.
        indices: their rows in the store; -1 where ``values`` is filled up.
        counts: how many images have a code > 0.
        means: the mean code over those images; 0 for a latent that no image activates.
        places: y and x of the cell of each top image at which the latent fires most, -1 where there is no
            image; None where codes are of pooled activations.
        images: N.
        labels: the class id of every image of the store, or None.
        classes: class names by class id.
        source: what this was made from: `codes`, `mode`, `ksae` and `store` with hashes, and the run's
            `model`, `dataset`, `layer`, `timestep`, ... as the store's manifest has them.
    """

    values: Float[Tensor, "n m"]
    indices: Int64[Tensor, "n m"]
    counts: Int64[Tensor, "n"]
    means: Float[Tensor, "n"]
    images: int
    labels: Int64[Tensor, "images"] | None
    classes: tuple[str, ...]
    source: dict[str, Any]
    places: Int64[Tensor, "n m 2"] | None = None

    @property
    def how(self) -> TopImagesConfig:
        """Which codes they were chosen by, and what an image's code was."""
        source = self.source
        over = source.get("cells", "pooled")
        return TopImagesConfig(m=self.m, codes=source["codes"], mode=source["mode"], over=over)

    @property
    def m(self) -> int:
        """How many images are kept for each latent."""
        return self.values.shape[1]

    @property
    def density(self) -> Float[Tensor, "n"]:
        """The share of the images that activate each latent."""
        return self.counts.double() / max(self.images, 1)

    @property
    def strength(self) -> Float[Tensor, "n"]:
        """Mean code over activating images, 0 for latents with :data:`MIN_IMAGES` or fewer of them."""
        return self.means * (self.counts > MIN_IMAGES)

    @property
    def statistics(self) -> dict[str, Any]:
        """How the latents fire, from the same pass as the images.

        ``l0``: codes > 0 an image; ``dead_share``: of latents that no image activates; ``density``: latents
        by log10 of their density, as :func:`revelio.sae.metrics.density_histogram` gives it; ``means``:
        deciles of the mean code over the latents that some image activates, lowest and highest included.
        """
        means = self.means[self.counts > 0].double()
        deciles = (
            means.quantile(torch.linspace(0, 1, 11, dtype=torch.float64)) if len(means) else means
        )
        return {
            "l0": float(self.counts.sum()) / max(self.images, 1),
            "dead_share": float((self.counts == 0).double().mean()),
            "density": density_histogram(self.counts, self.images),
            "means": [float(f"{value:.4g}") for value in deciles.tolist()],
        }

    def ranking(self, latents: int | None = None) -> Int64[Tensor, "latents"]:
        """Latents that some image activates: by strength, then mean, then index; the first so many."""
        by_mean = torch.sort(self.means, descending=True, stable=True).indices
        by_strength = torch.sort(self.strength[by_mean], descending=True, stable=True).indices
        order = by_mean[by_strength]
        return order[self.counts[order] > 0][:latents]


class RunningTop:
    """Running top-m, counts and sums; its size is n x m, whatever the number of images."""

    def __init__(self, n: int, m: int) -> None:
        self.values = torch.zeros(n, m)
        self.indices = torch.full((n, m), -1, dtype=torch.int64)
        self.counts = torch.zeros(n, dtype=torch.int64)
        self.sums = torch.zeros(n, dtype=torch.float64)

    def count(self, latents: Tensor, values: Tensor) -> None:
        """Take in which latents fire, an entry for each image that one fires in."""
        self.counts.index_add_(0, latents, torch.ones_like(latents))
        self.sums.index_add_(0, latents, values.double())

    def add(self, latents: Tensor, values: Tensor, rows: Tensor) -> None:
        """Merge entries (latent, value, row), rows ascending for each latent and new to it."""
        # Rows arrive in ascending order, so an entry that only equals the last kept one loses to it.
        wanted = values > self.values[latents, -1]
        latents, values, rows = latents[wanted], values[wanted], rows[wanted]
        touched = latents.unique()
        if not len(touched):
            return
        m = self.values.shape[1]
        all_latents = torch.cat([touched.repeat_interleave(m), latents])
        all_values = torch.cat([self.values[touched].flatten(), values])
        all_rows = torch.cat([self.indices[touched].flatten(), rows])
        # Two stable sorts: by value inside each latent; equal values stay in the order of their rows.
        by_value = torch.sort(all_values, descending=True, stable=True).indices
        order = by_value[torch.sort(all_latents[by_value], stable=True).indices]
        sorted_latents = all_latents[order]
        starts = torch.searchsorted(sorted_latents, touched)
        kept = order[starts[:, None] + torch.arange(m)]
        self.values[touched], self.indices[touched] = all_values[kept], all_rows[kept]


def top_images(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    config: TopImagesConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: Callable[[int], object] | None = None,
) -> TopImages:
    """The top images of every latent of ``model`` over the images of ``store``.

    Args:
        model: the k-SAE.
        store: pooled activations; or grids, which are pooled; or, where codes are of cells, grids or cells.
        config: how many images are kept, by which codes.
        device: where the k-SAE runs.
        progress: told the number of images after each batch.

    Raises:
        ValueError: a setting is outside its bounds, or the store is none of the k-SAE's (:func:`check_fits`).
    """
    from revelio.sae.kernels.select import moved

    config = config or TopImagesConfig()
    check_fields(config)
    check_fits(model, store)
    model = moved(model, device).eval()
    running, over = RunningTop(model.n, config.kept), over_cells(model, config)
    read = _read_pooled if over == "pooled" else _read_cells
    with torch.inference_mode():
        for images in read(running, model, store, config, device):
            if progress is not None:
                progress(images)
    places = None
    if over != "pooled":
        each = store.cells_an_image
        there = running.indices >= 0
        places = torch.full((*there.shape, 2), -1)
        places[there] = store.cell_places(running.indices[there])
        running.indices[there] //= each
    return TopImages(
        values=running.values,
        indices=running.indices,
        counts=running.counts,
        means=(running.sums / running.counts.clamp(min=1)).float(),
        images=len(store) if over == "pooled" else store.images,
        labels=store.labels,
        classes=tuple(store.classes),
        source={"codes": config.kind, "mode": config.mode}
        | ({} if over == "pooled" else {"cells": over}),
        places=places,
    )


def over_cells(model: "KSparseAutoencoder", config: TopImagesConfig) -> OverCells:
    """What an image's code is of: as the config says, or as the k-SAE was trained.

    Raises:
        ValueError: dense codes of cells are asked for.
    """
    over = config.over or own_over(model)
    if over != "pooled" and config.kind == "dense":
        raise ValueError(
            "dense codes are of pooled activations: take sparse codes, or cells pooled"
        )
    return over


def own_over(model: "KSparseAutoencoder") -> OverCells:
    """What an image's code is of where nothing is said: as the k-SAE was trained."""
    return "max" if model.trained_on.get("rows_are") == "cells" else "pooled"


def _read_pooled(
    running: "RunningTop",
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    config: TopImagesConfig,
    device: str | torch.device,
) -> Iterator[int]:
    """Take in the codes of whole images; gives how many are done at a time."""
    for start, rows in store.batches(config.batch_size):
        activations = pooled(rows).to(device)
        if config.kind == "sparse":
            codes = model.encode(activations, store.manifest)
            _add_sparse(running, codes, start)
        else:
            activations = model.normalized(activations, store.manifest)
            _add_dense(running, model, activations, start, config.latent_chunk)
        yield len(rows)


def _read_cells(
    running: "RunningTop",
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    config: TopImagesConfig,
    device: str | torch.device,
) -> Iterator[int]:
    """Take in what the codes of cells come to for their images; entries are counted in cells of the store."""
    over, each = over_cells(model, config), store.cells_an_image
    assert over != "pooled"
    step = max(1, config.batch_size // each)
    for start in range(0, store.images, step):
        cells = store.image_cells(start, min(start + step, store.images))
        values, indices = encode_cells(model, cells.flatten(0, 1).to(device), store.manifest)
        values, indices = (x.cpu().unflatten(0, (-1, each)) for x in (values, indices))
        found = image_codes(values, indices, model.n, over)
        running.count(found.latents, found.values)
        running.add(found.latents, found.values, (start + found.images) * each + found.cells)
        yield len(cells)


def pooled(rows: Tensor) -> Float[Tensor, "b d"]:
    """Rows of a store as float32 activations (b d): grids (b c h w) are averaged over their cells."""
    rows = rows.float()
    return rows.mean((-2, -1)) if rows.ndim == 4 else rows


def check_fits(model: "KSparseAutoencoder", store: "ActivationStore") -> None:
    """Warn where a store is of another timestep or other prompts than what the k-SAE was trained on.

    Raises:
        ValueError: it is of another width, model or layer.
    """
    width, about = store.row_shape[0], store.manifest
    if width != model.d:
        raise ValueError(
            f"the store's activations have {plural(width, 'channel')} and the k-SAE takes {model.d}: "
            "give the store (layer) that the k-SAE was trained on"
        )
    trained = trained_stores(model.trained_on)
    if about.get("model") is None or not all(one.get("model") for one in trained):
        return
    like = [one for one in trained if all(one.get(key) == about.get(key) for key in PLACE)]
    if not like:
        raise ValueError(
            f"{store.path} is of {_told(about, PLACE)}, and the k-SAE was trained on "
            f"{_told(trained[0], PLACE)}: give a store of that"
        )
    if not any(all(one.get(key) == about.get(key) for key in SETTING) for one in like):
        warnings.warn(
            f"{store.path} is of {_told(about, SETTING)}, and the k-SAE was trained on "
            f"{_told(like[0], SETTING)}: its latents may mean something else there",
            stacklevel=3,
        )


def _told(about: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {printable(about.get(key))}" for key in keys)


def _add_sparse(running: RunningTop, codes: Codes, start: int) -> None:
    values, latents = codes.values.float().cpu(), codes.indices.cpu()
    rows = torch.arange(start, start + len(values))[:, None].expand_as(latents)
    positive = values > 0
    latents, values, rows = latents[positive], values[positive], rows[positive]
    running.count(latents, values)
    running.add(latents, values, rows)


def _add_dense(
    running: RunningTop, model: Any, activations: Tensor, start: int, chunk: int
) -> None:
    m = running.values.shape[1]
    for first in range(0, model.n, chunk):
        part = slice(first, min(first + chunk, model.n))
        codes = model.preactivations(activations, part, "normalized").float().relu()
        running.counts[part] += codes.count_nonzero(0).cpu()
        running.sums[part] += codes.sum(0, dtype=torch.float64).cpu()
        # The value to beat leaves few candidates: the m-th so far, and at first the batch's own m-th (ties
        # stay in, for `add` to settle).
        kept = codes > running.values[part, -1].to(codes.device)
        if start == 0:
            kept &= codes >= codes.topk(min(m, len(codes)), dim=0).values[-1]
        columns, latents = kept.nonzero(as_tuple=True)
        values = codes[columns, latents]
        running.add(latents.cpu() + first, values.cpu(), columns.cpu() + start)
