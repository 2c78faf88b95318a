"""Where in an image a latent fires: its codes over the cells of a grid, for the images that are shown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from revelio.analysis.cells import GridCodes, store_codes

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

LEVELS = 255
# Of an image the maps of so many latents are kept, and of each the cells above this share of its strongest.
MAPPED, WEAK = 8, 0.1

# For a latent: by image, the cells that it fires on and how strongly, as cell, level, cell, level, ...
Maps = dict[int, list[int]]


def heat_maps(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    chosen: Int64[Tensor, "l"],
    shown: Sequence[Sequence[int]],
) -> list[Maps]:
    """The maps of each latent over the images that are shown of it, in one pass over a store of whole grids.

    Args:
        model: the k-SAE; each cell of a grid is encoded as a row is.
        store: whole grids (c h w).
        chosen: the latents of the gallery.
        shown: for each of them, the rows that are shown.

    Returns:
        For each latent its maps; levels go from 0 to 255, the latent's strongest cell among them.
    """
    wanted: dict[int, list[int]] = {}
    for place, rows in enumerate(shown):
        for row in rows:
            wanted.setdefault(row, []).append(place)
    found: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in shown]
    model = model.eval()
    for start, codes in store_codes(model, store, chosen):
        for number in range(len(codes.values)):
            places = wanted.get(start + number, [])
            maps = sparse_maps(codes, number, chosen[places])
            for place, one in zip(places, maps, strict=True):
                found[place][start + number] = one
    return [levels(maps) for maps in found]


def image_maps(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    chosen: Int64[Tensor, "l"],
    records: Iterable[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The records of a store's images, in its order, with where their strongest latents fire.

    ``maps``: of the first :data:`MAPPED` active latents, each on its own scale, weak cells left out.
    """
    left = iter(records)
    for _, codes in store_codes(model, store, chosen):
        for number in range(len(codes.values)):
            record = next(left)
            places = [int(place) for place, _ in record["active"][:MAPPED]]
            maps = sparse_maps(codes, number, chosen[places])
            yield record | {"maps": [levels({0: _strong(*one)})[0] for one in maps]}


def _strong(cells: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    kept = codes >= codes.max() * WEAK if len(codes) else codes > 0
    return cells[kept], codes[kept]


def sparse_maps(
    codes: GridCodes, image: int, latents: Int64[Tensor, "l"]
) -> list[tuple[Tensor, Tensor]]:
    """For each latent the cells of an image that it fires on, ascending, and its codes there."""
    values, indices = (x[image].flatten(0, 1).cpu() for x in (codes.values, codes.indices))
    if not len(latents):
        return []
    order = latents.sort()
    slots = torch.searchsorted(order.values, indices).clamp(max=len(latents) - 1)
    at, slot = ((order.values[slots] == indices) & (values > 0)).nonzero(as_tuple=True)
    places, codes_there = order.indices[slots[at, slot]], values[at, slot].float()
    return [(at[places == place], codes_there[places == place]) for place in range(len(latents))]


def levels(maps: Mapping[int, tuple[Tensor, Tensor]]) -> Maps:
    """Whole numbers of a latent's maps, on one scale."""
    most = max((float(codes.max()) for _, codes in maps.values() if len(codes)), default=1.0)
    return {
        row: torch.stack([cells, (codes / most * LEVELS).round().long().clamp(min=1)], 1)
        .flatten()
        .tolist()
        for row, (cells, codes) in maps.items()
    }
