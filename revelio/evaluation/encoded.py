"""A model's codes on the held-out images: what every measure is a function of.

An image is one activation, or all its cells: its code of a latent is then their maximum or mean, its error
their sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.analysis.cells import image_codes
from revelio.sae.inputs import Source
from revelio.sae.model import KSparseAutoencoder

if TYPE_CHECKING:
    from scipy.sparse import csc_array

BATCH = 1024


@dataclass(frozen=True)
class Encoded:
    """Sparse codes of N images, and how well they reconstruct.

    Attributes:
        model: what made them.
        values: codes, 0 where fewer latents are active than the width says.
        latents: their latents.
        errors: squared error of each image, summed over dimensions and cells.
        cosines: of each activation and its reconstruction, both about the mean activation; of cells the mean.
        slope: how their mean changes with the mean activation that they are about.
    """

    model: KSparseAutoencoder
    values: Float[Tensor, "images width"]
    latents: Int64[Tensor, "images width"]
    errors: Float[Tensor, " images"]
    cosines: Float[Tensor, " images"]
    slope: Float[Tensor, " d"]

    @cached_property
    def matrix(self) -> "csc_array":
        """Codes > 0 as a sparse matrix (images n)."""
        from scipy.sparse import csc_array

        images = len(self.values)
        kept = self.values.flatten() > 0
        rows = torch.arange(images).repeat_interleave(self.values.shape[1])[kept]
        entries = (
            self.values.flatten()[kept].numpy(),
            (rows.numpy(), self.latents.flatten()[kept].numpy()),
        )
        return csc_array(entries, shape=(images, self.model.n))

    @cached_property
    def firings(self) -> Int64[Tensor, " n"]:
        """On how many images each latent has a code > 0."""
        return torch.from_numpy(np.diff(self.matrix.indptr).astype(np.int64))

    def strongest(self, latents: int, at_least: int) -> Int64[Tensor, " l"]:
        """The latents with the largest mean code among those with ``at_least`` firings, strongest first."""
        sums = torch.from_numpy(np.asarray(self.matrix.sum(0))).double()
        means = sums / self.firings.clamp(min=1)
        order = torch.sort(means, descending=True, stable=True).indices
        return order[self.firings[order] >= at_least][:latents]

    def top(self, latent: int) -> tuple[Int64[Tensor, " f"], Float[Tensor, " f"]]:
        """The images a latent fires on, strongest first (ties: the lower row), and its codes."""
        start, stop = self.matrix.indptr[latent], self.matrix.indptr[latent + 1]
        images = self.matrix.indices[start:stop]
        codes = np.asarray(self.matrix.data[start:stop], dtype=np.float32)
        order = np.lexsort((images, -codes))
        return torch.from_numpy(images[order].astype(np.int64)), torch.from_numpy(codes[order])


@torch.no_grad()
def encoded(
    model: KSparseAutoencoder,
    rows: Float[Tensor, "images d"] | Float[Tensor, "images c d"],
    source: Source = None,
    over: Literal["max", "mean"] = "max",
) -> Encoded:
    """Encode and reconstruct all rows.

    Args:
        model: what encodes.
        rows: an activation an image, or its cells.
        source: which input of the k-SAE they are of.
        over: what the codes of an image's cells come to for the image.
    """
    parts = list(_batches(model, rows, source, over))
    width = max(values.shape[1] for values, *_ in parts)
    values, latents = (
        torch.cat(
            [torch.nn.functional.pad(part[i], (0, width - part[i].shape[1])) for part in parts]
        )
        for i in (0, 1)
    )
    errors, cosines, slopes = (torch.cat([part[i] for part in parts]) for i in (2, 3, 4))
    return Encoded(
        model, values, latents, errors, cosines, slopes.sum(0) / rows.flatten(0, -2).shape[0]
    )


def _batches(
    model: KSparseAutoencoder, rows: Tensor, source: Source, over: Literal["max", "mean"]
) -> Iterator[tuple[Tensor, ...]]:
    mean = rows.flatten(0, -2).mean(0)
    cells = rows.shape[1] if rows.ndim == 3 else 1
    for batch in rows.split(max(1, BATCH // cells)):
        flat = batch.flatten(0, -2)
        codes = model.encode(flat, source)
        made = model.decode(codes, source).cpu()
        errors = (made - flat).double().square().sum(1)
        cosines, slopes = _about(mean, made, flat)
        values, latents = codes.values.cpu(), codes.indices.cpu()
        if rows.ndim == 3:
            values, latents = (one.unflatten(0, (-1, cells)) for one in (values, latents))
            values, latents = _of_images(values, latents, model.n, over)
        cosines = cosines.view(-1, cells).mean(1)
        yield values, latents, errors.view(-1, cells).sum(1), cosines, slopes.sum(0, keepdim=True)


def _about(mean: Tensor, made: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of rows about a mean, and their gradients by it."""
    one, other = (made - mean).double(), (rows - mean).double()
    length, its = (x.norm(dim=1, keepdim=True).clamp(min=1e-8) for x in (one, other))
    one, other = one / length, other / its
    cosines = (one * other).sum(1, keepdim=True)
    slopes = (cosines * one - other) / length + (cosines * other - one) / its
    return cosines[:, 0], slopes


def _of_images(
    values: Tensor, latents: Tensor, n: int, over: Literal["max", "mean"]
) -> tuple[Float[Tensor, "b width"], Int64[Tensor, "b width"]]:
    """The codes of whole images out of those of their cells, filled up with 0."""
    found = image_codes(values, latents, n, over)
    counts = torch.bincount(found.images, minlength=len(values))
    place = torch.arange(len(found.images)) - (counts.cumsum(0) - counts)[found.images]
    shape = (len(values), int(counts.max()))
    made, names = torch.zeros(shape), torch.zeros(shape, dtype=torch.int64)
    made[found.images, place], names[found.images, place] = found.values, found.latents
    return made, names


def first_of_each(alike: Bool[Tensor, "m m"]) -> list[int]:
    """Those that are like none kept before them: near-duplicates counted once, the first of each."""
    kept: list[int] = []
    for place in range(len(alike)):
        if not alike[place, kept].any():
            kept.append(place)
    return kept
