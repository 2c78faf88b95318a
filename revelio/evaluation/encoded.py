"""A model's codes on the held-out images: what every measure is a function of."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

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
        errors: squared error of each image, summed over dimensions.
        cosines: of each activation and its reconstruction, both about the mean activation.
    """

    model: KSparseAutoencoder
    values: Float[Tensor, "images width"]
    latents: Int64[Tensor, "images width"]
    errors: Float[Tensor, " images"]
    cosines: Float[Tensor, " images"]

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
        images, codes = self.matrix.indices[start:stop], self.matrix.data[start:stop]
        order = np.lexsort((images, -codes))
        return torch.from_numpy(images[order].astype(np.int64)), torch.from_numpy(codes[order])


@torch.no_grad()
def encoded(
    model: KSparseAutoencoder, rows: Float[Tensor, "images d"], source: Source = None
) -> Encoded:
    """Encode and reconstruct all rows; ``source``: which input of the k-SAE they are of."""
    parts = list(_batches(model, rows, rows.mean(0), source))
    width = max(values.shape[1] for values, *_ in parts)
    values, latents = (
        torch.cat(
            [torch.nn.functional.pad(part[i], (0, width - part[i].shape[1])) for part in parts]
        )
        for i in (0, 1)
    )
    return Encoded(
        model, values, latents, *(torch.cat([part[i] for part in parts]) for i in (2, 3))
    )


def _batches(
    model: KSparseAutoencoder, rows: Tensor, mean: Tensor, source: Source
) -> Iterator[tuple[Tensor, ...]]:
    for batch in rows.split(BATCH):
        codes = model.encode(batch, source)
        made = model.decode(codes, source).cpu()
        errors = (made - batch).double().square().sum(1)
        cosines = torch.cosine_similarity(made - mean, batch - mean).double()
        yield codes.values.cpu(), codes.indices.cpu(), errors, cosines
