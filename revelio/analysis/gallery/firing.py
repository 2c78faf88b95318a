"""How latents fire over all images: their codes, near misses, and which fire on the same images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.sparse import csr_matrix
from torch import Tensor

from revelio.analysis.cells import encode_cells, image_codes
from revelio.analysis.config import OverCells
from revelio.analysis.top_images import RunningTop, pooled

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

# Latents at a time where something is dense in them.
CHUNK = 1024


@dataclass(frozen=True)
class Firing:
    """The codes that a k-SAE's rule keeps, of the latents of a gallery.

    Attributes:
        codes: a row an image and a column a latent of the gallery, zeros left out.
        active: how many latents of the whole k-SAE each image has.
    """

    codes: csr_matrix
    active: Int64[Tensor, " images"]


def firing(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    chosen: Int64[Tensor, "l"],
    over: OverCells = "pooled",
    batch_size: int = 1024,
) -> Firing:
    """The codes of the latents ``chosen`` on every image of a store; a few numbers an image are kept.

    Args:
        model: the k-SAE.
        store: the activations.
        chosen: the latents of the gallery.
        over: what an image's code is of, as with the top images.
        batch_size: rows at a time.
    """
    place_of = _places(model.n, chosen)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    active = torch.zeros(store.images, dtype=torch.int64)
    read = _pooled_codes if over == "pooled" else _cell_codes
    with torch.inference_mode():
        for images, latents, values in read(model, store, over, batch_size):
            active += torch.bincount(images, minlength=store.images)
            inside = place_of[latents] >= 0
            parts.append((values[inside], images[inside], place_of[latents[inside]]))
    values, images, places = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    codes = csr_matrix((values, (images, places)), (store.images, len(chosen)))
    return Firing(codes, active)


# Which images and latents fire together, and the codes; entries of one batch.
Entries = Iterator[tuple[Tensor, Tensor, Tensor]]


def _pooled_codes(
    model: "KSparseAutoencoder", store: "ActivationStore", over: OverCells, batch_size: int
) -> Entries:
    device = next(model.parameters()).device
    for start, rows in store.batches(batch_size):
        codes = model.encode(pooled(rows).to(device), store.manifest)
        values, latents = codes.values.float().cpu(), codes.indices.cpu()
        images, slots = (values > 0).nonzero(as_tuple=True)
        yield images + start, latents[images, slots], values[images, slots]


def _cell_codes(
    model: "KSparseAutoencoder", store: "ActivationStore", over: OverCells, batch_size: int
) -> Entries:
    assert over != "pooled"
    device, each = next(model.parameters()).device, store.cells_an_image
    step = max(1, batch_size // each)
    for start in range(0, store.images, step):
        cells = store.image_cells(start, min(start + step, store.images))
        found = encode_cells(model, cells.flatten(0, 1).to(device), store.manifest)
        values, indices = (x.cpu().unflatten(0, (-1, each)) for x in found)
        codes = image_codes(values, indices, model.n, over)
        yield codes.images + start, codes.latents, codes.values


def _places(n: int, chosen: Int64[Tensor, "l"]) -> Int64[Tensor, " n"]:
    """For each latent of the k-SAE its place in the gallery, or -1."""
    places = torch.full((n,), -1, dtype=torch.int64)
    places[chosen] = torch.arange(len(chosen))
    return places


def together(codes: Any, count: int) -> list[list[list[float]]]:
    """For each latent the others that fire most on the same images: [place, cosine of their codes].

    The cosine is between the columns of codes over all images: 1 for two that always fire together in the
    same proportion, 0 for two that never do.
    """
    lengths = np.sqrt(codes.multiply(codes).sum(0)).A1
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    units = codes.multiply(scale[None, :]).tocsc()
    found: list[list[list[float]]] = []
    for start in range(0, units.shape[1], CHUNK):
        block = (units[:, start : start + CHUNK].T @ units).tocsr()
        for row in range(block.shape[0]):
            part = slice(block.indptr[row], block.indptr[row + 1])
            others, cosines = block.indices[part], block.data[part]
            order = np.lexsort((others, -cosines))
            pairs = [[int(others[i]), float(cosines[i])] for i in order]
            found.append([pair for pair in pairs[: count + 1] if pair[0] != start + row][:count])
    return found


def near_misses(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    chosen: Int64[Tensor, "l"],
    count: int,
    batch_size: int = 256,
) -> tuple[Int64[Tensor, "l count"], Float[Tensor, "l count"]]:
    """The images on which each latent came closest to firing without doing so.

    An image's gap is what the latent's pre-activation lacks to the smallest code that the image keeps.

    Returns:
        Rows of the store, the smallest gap first (-1 where there are fewer), and the gaps.
    """
    running, order = RunningTop(len(chosen), count), chosen.sort()
    if not count:
        return running.indices, running.values
    device = next(model.parameters()).device
    with torch.inference_mode():
        for start, rows in store.batches(batch_size):
            x = pooled(rows).to(device)
            codes = model.encode(x, store.manifest)
            least = _least(model, codes.values.float())
            fires = torch.zeros(len(x), model.n, dtype=torch.bool, device=device)
            images, slots = (codes.values > 0).nonzero(as_tuple=True)
            fires[images, codes.indices[images, slots]] = True
            x = model.normalized(x, store.manifest)
            for first in range(0, model.n, CHUNK):
                part = slice(first, min(first + CHUNK, model.n))
                low, high = torch.searchsorted(
                    order.values, torch.tensor([part.start, part.stop])
                ).tolist()
                if low == high:
                    continue
                inside = order.values[low:high] - first
                gaps = (
                    least - model.preactivations(x, part, "normalized").float()[:, inside]
                ).clamp(min=0)
                closeness = (1 / (1 + gaps)).masked_fill(fires[:, part][:, inside], 0).cpu()
                _add(running, closeness, order.indices[low:high], start)
    gaps = torch.where(running.indices >= 0, 1 / running.values.clamp(min=1e-12) - 1, 0.0)
    return running.indices, gaps


def _least(model: "KSparseAutoencoder", values: Float[Tensor, "b k"]) -> Float[Tensor, "b 1"]:
    """What a pre-activation must exceed in each image to be kept.

    With TopK the k-th code, which may be 0; with the other rules, whose rows are filled up with zeros, the
    smallest code that is kept.
    """
    if model.activation != "topk":
        values = values.where(values > 0, values.amax(1, keepdim=True))
    return values.clamp(min=0).amin(1, keepdim=True)


def _add(running: RunningTop, closeness: Tensor, places: Tensor, start: int) -> None:
    """Merge a batch's closeness (images, latents) of the latents at ``places``."""
    m = running.values.shape[1]
    last = closeness.topk(min(m, len(closeness)), dim=0).values[-1]
    kept = (closeness > running.values[places, -1]) & (closeness >= last)
    images, columns = kept.nonzero(as_tuple=True)
    running.add(places[columns], closeness[images, columns], images + start)
