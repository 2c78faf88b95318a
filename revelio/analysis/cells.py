"""What a k-SAE finds at each cell of a grid: sparse codes by place, heat maps, what an image's cells come to.

    codes = encode_grid(model, grids)                  # (b h w k): never a dense (b n h w)
    codes.maps(torch.tensor([7, 42]))                  # (b 2 h w): where latents 7 and 42 fire
    for start, codes in store_codes(model, store): ... # a whole store, some images at a time

A latent's code of an image is the maximum or the mean of its cells' codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.sae.inputs import Source

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

# Cells that are encoded at a time.
CELLS = 8192


@dataclass(frozen=True)
class GridCodes:
    """The sparse codes of grids, by place.

    Attributes:
        values: of the kept latents of each cell, descending or filled up with 0.
        indices: which latents they are.
    """

    values: Float[Tensor, "b h w k"]
    indices: Int64[Tensor, "b h w k"]

    def maps(self, latents: Int64[Tensor, " l"]) -> Float[Tensor, "b l h w"]:
        """Where each of some latents fires, and how strongly.

        Raises:
            ValueError: a latent is asked for twice.
        """
        if len(latents.unique()) != len(latents):
            raise ValueError("a latent is asked for twice: name each once")
        b, h, w, k = self.indices.shape
        latents = latents.to(self.indices.device)
        highest = max([int(one.max()) for one in (self.indices, latents) if one.numel()], default=0)
        place_of = torch.full((highest + 1,), -1, device=latents.device)
        place_of[latents] = torch.arange(len(latents), device=latents.device)
        asked = place_of[self.indices.reshape(b, h * w, k)]
        image, cell, slot = (asked >= 0).nonzero(as_tuple=True)
        found = torch.zeros(b, len(latents), h * w, device=self.values.device)
        values = self.values.reshape(b, h * w, k)[image, cell, slot]
        # Summed, as what fills up a cell's codes names some latent with the value 0.
        found.index_put_((image, asked[image, cell, slot], cell), values.float(), accumulate=True)
        return found.view(b, len(latents), h, w)


def encode_grid(
    model: "KSparseAutoencoder",
    grid: Float[Tensor, "b d h w"],
    source: Source = None,
    latents: Int64[Tensor, " l"] | None = None,
) -> GridCodes:
    """The codes of every cell of grids.

    Args:
        model: the k-SAE.
        grid: activations, on any device.
        source: which input of the k-SAE they are of; see :meth:`KSparseAutoencoder.encode`.
        latents: the ones whose codes are wanted, where not all are: others' may be missing.

    Raises:
        ValueError: the grids are not (b d h w) with the k-SAE's d.
    """
    if grid.ndim != 4 or grid.shape[1] != model.d:
        raise ValueError(
            f"grids of shape {tuple(grid.shape)} for a k-SAE of width {model.d}: "
            f"give (images, {model.d}, height, width)"
        )
    b, d, h, w = grid.shape
    values, indices = encode_cells(model, grid.permute(0, 2, 3, 1).reshape(-1, d), source, latents)
    return GridCodes(values.view(b, h, w, -1), indices.view(b, h, w, -1))


@torch.no_grad()
def encode_cells(
    model: "KSparseAutoencoder",
    rows: Float[Tensor, "b d"],
    source: Source = None,
    latents: Int64[Tensor, " l"] | None = None,
) -> tuple[Float[Tensor, "b k"], Int64[Tensor, "b k"]]:
    """Values and indices of the codes of any number of cells, as wide as the fullest cell needs."""
    parts = [model.encode(part.float(), source, latents) for part in rows.split(CELLS)]
    if not parts:
        return rows.new_zeros(0, model.k), torch.zeros(0, model.k, dtype=torch.int64)
    width = max(part.values.shape[1] for part in parts)
    # With BatchTopK and JumpReLU the width is each batch's own.
    pad = torch.nn.functional.pad
    values = [pad(part.values, (0, width - part.values.shape[1])) for part in parts]
    indices = [pad(part.indices, (0, width - part.indices.shape[1])) for part in parts]
    return torch.cat(values), torch.cat(indices)


def store_codes(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    latents: Int64[Tensor, " l"] | None = None,
) -> Iterator[tuple[int, GridCodes]]:
    """The codes of a store of whole grids, some images at a time, with the row of the first.

    ``latents`` as in :func:`encode_grid`.

    Raises:
        ValueError: the store holds no grids.
    """
    if len(store.row_shape) != 3:
        raise ValueError(f"{store.path} holds no grids: extract them with pool none or a side")
    size = max(1, CELLS // (store.row_shape[1] * store.row_shape[2]))
    for start, grids in store.batches(size):
        yield start, encode_grid(model, grids, store.manifest, latents)


@dataclass(frozen=True)
class ImageCodes:
    """Codes of whole images: an entry for each image and latent that fires in it, image by image.

    Attributes:
        images: which image of the batch.
        latents: which latent.
        values: the maximum or the mean over the image's cells.
        cells: at which cell it is largest; of equal ones the first.
    """

    images: Int64[Tensor, " e"]
    latents: Int64[Tensor, " e"]
    values: Float[Tensor, " e"]
    cells: Int64[Tensor, " e"]


def image_codes(
    values: Float[Tensor, "b c k"],
    indices: Int64[Tensor, "b c k"],
    n: int,
    over: Literal["max", "mean"],
) -> ImageCodes:
    """What the codes of an image's c cells come to for the image; only codes above 0 count.

    Args:
        values: of the codes.
        indices: the latents.
        n: how many latents there are.
        over: the maximum over the cells, or the mean, to which a cell where a latent is silent adds 0.
    """
    positive = values > 0
    image, cell, _ = positive.nonzero(as_tuple=True)
    kept, latent = values[positive].float(), indices[positive]
    keys, entry = torch.unique(image * n + latent, return_inverse=True)
    highest = torch.zeros(len(keys)).scatter_reduce_(0, entry, kept, "amax")
    best = kept == highest[entry]
    cells = torch.full((len(keys),), values.shape[1])
    cells.scatter_reduce_(0, entry[best], cell[best], "amin")
    if over == "mean":
        total = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, entry, kept.double())
        highest = (total / values.shape[1]).float()
    return ImageCodes(keys // n, keys % n, highest, cells)
