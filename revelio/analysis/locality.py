"""How local and how stable the latents of a k-SAE of cells are, each measure beside its chance level.

For a latent with codes a_p >= 0 at the cells p of an image in which it fires:

    spatial entropy    - sum_p (a_p / sum a) log(a_p / sum a) / log(cells): 0 at one cell, 1 spread evenly
    half area          the share of cells with a_p >= max a / 2
    agreement          the cosine of two maps of the same image: moved and moved back, or of two noise draws
    timestep profile   the share of cells at which it fires, for each timestep
    IoU                of its cells above half its maximum with the cells of a class, over all images; the
                       best class (Network Dissection, Bau et al. 2017)

Chance: for entropy and half area the same codes at random cells of random images (what sparsity alone
gives); for agreement the map of another image; for IoU masks that are shifted at random, each image's by its
own, again with the best class. Intervals are 95 % bootstraps, over latents for means over latents; the values
of single latents stand beside their mean, as `of_latents`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.analysis.cells import store_codes
from revelio.seeds import key_seed
from revelio.wording import plural

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

SAMPLES = 1000


@dataclass(frozen=True)
class Firings:
    """Where some latents fire in some images: an entry for each code above 0.

    Attributes:
        latents: place of the latent among those asked for.
        images: which image.
        cells: which cell, in the order of reading.
        values: the codes.
        asked: how many latents were asked for.
        count: how many images were read.
        grid: height and width.
    """

    latents: Int64[Tensor, " e"]
    images: Int64[Tensor, " e"]
    cells: Int64[Tensor, " e"]
    values: Float[Tensor, " e"]
    asked: int
    count: int
    grid: tuple[int, int]

    @property
    def size(self) -> int:
        """Cells an image."""
        return self.grid[0] * self.grid[1]

    def maps(self) -> Float[Tensor, "b l h w"]:
        """Where each latent fires in each image, densely."""
        maps = torch.zeros(self.count, self.asked, self.size)
        maps[self.images, self.latents, self.cells] = self.values.float()
        return maps.view(self.count, self.asked, *self.grid)

    def shuffled(self, seed: int) -> "Firings":
        """The same codes at random cells of random images, no two of a latent at one cell."""
        rng = np.random.default_rng(key_seed(seed, "shuffled firings"))
        places = torch.empty_like(self.cells)
        order = torch.sort(self.latents, stable=True).indices
        for part in order.split(torch.bincount(self.latents, minlength=self.asked).tolist()):
            chosen = rng.choice(self.count * self.size, len(part), replace=False)
            places[part] = torch.from_numpy(chosen)
        return Firings(
            self.latents,
            places // self.size,
            places % self.size,
            self.values,
            self.asked,
            self.count,
            self.grid,
        )


def firings(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    latents: Int64[Tensor, " l"],
    images: int | None = None,
) -> Firings:
    """Where latents fire in the first ``images`` images of a store of whole grids.

    Memory grows with the codes above 0 of the latents asked for, not with images times cells.

    Raises:
        ValueError: the store holds no grids, or not of the k-SAE's width.
    """
    place_of = torch.full((model.n,), -1)
    place_of[latents] = torch.arange(len(latents))
    count = min(images or store.images, store.images)
    parts: list[tuple[Tensor, ...]] = []
    for start, codes in store_codes(model, store, latents):
        if start >= count:
            break
        kept = codes.values[: count - start].flatten(1, 2).cpu()
        asked = place_of[codes.indices[: count - start].flatten(1, 2).cpu()]
        wanted = (asked >= 0) & (kept > 0)
        image, cell, _ = wanted.nonzero(as_tuple=True)
        parts.append((asked[wanted], image + start, cell, kept[wanted]))
    found = [torch.cat(one) for one in zip(*parts, strict=True)]
    grid = (store.row_shape[1], store.row_shape[2])
    return Firings(found[0], found[1], found[2], found[3], len(latents), count, grid)


def spatial(found: Firings) -> dict[str, Float[np.ndarray, " l"]]:
    """Spatial entropy and half area of each latent, the mean over images in which it fires; NaN: none."""
    keys, entry = torch.unique(found.latents * found.count + found.images, return_inverse=True)
    values = found.values.double()

    def over_cells(terms: Tensor) -> Tensor:
        return torch.zeros(len(keys), dtype=torch.float64).index_add_(0, entry, terms)

    share = values / over_cells(values)[entry]
    scale = float(np.log(found.size)) or 1.0
    entropy = over_cells(-share * share.log()) / scale
    highest = torch.zeros(len(keys), dtype=torch.float64)
    highest.scatter_reduce_(0, entry, values, "amax")
    area = over_cells((values >= highest[entry] / 2).double()) / found.size
    of_latent = keys // found.count
    images = torch.bincount(of_latent, minlength=found.asked)
    total = {"spatial_entropy": entropy, "half_area": area}
    return {
        name: (
            torch.zeros(found.asked, dtype=torch.float64).index_add_(0, of_latent, one) / images
        ).numpy()
        for name, one in total.items()
    }


def locality(found: Firings, *, seed: int = 0) -> dict[str, Any]:
    """Mean spatial entropy and half area over latents that fire, with intervals, beside chance."""
    ours, chance = spatial(found), spatial(found.shuffled(seed))
    return {name: _beside(ours[name], chance[name], seed) for name in ours}


def agreement(
    maps: Float[Tensor, "b l h w"],
    others: Float[Tensor, "b l h w"],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The cosine of each latent's maps with other maps of the same images, and with those of other images.

    Args:
        maps: where latents fire.
        others: where they fire once the image was moved and the map moved back, or at another noise draw.
        seed: of the bootstrap.

    Raises:
        ValueError: the maps are not of the same shape, or of one image alone.
    """
    if maps.shape != others.shape or len(maps) < 2:
        raise ValueError(
            f"maps of shapes {tuple(maps.shape)} and {tuple(others.shape)}: give two images or more, of "
            "one shape"
        )
    return _beside(_cosines(maps, others), _cosines(maps, others.roll(1, 0)), seed)


def _cosines(one: Tensor, other: Tensor) -> Float[np.ndarray, " l"]:
    """Of each latent, the mean over the images in which it fires on either side; NaN: in none."""
    a, b = one.flatten(2).double(), other.flatten(2).double()
    norms = a.norm(dim=2) * b.norm(dim=2)
    fires = (a.norm(dim=2) > 0) | (b.norm(dim=2) > 0)
    cosines = (a * b).sum(2) / norms.where(norms > 0, torch.ones_like(norms))
    return ((cosines * fires).sum(0) / fires.sum(0)).numpy()


def flipped(maps: Float[Tensor, "... h w"]) -> Float[Tensor, "... h w"]:
    """Maps (or pixels) mirrored left to right: what a mirrored image's map is moved back by."""
    return maps.flip(-1)


def overlap(
    maps: Float[Tensor, "b l h w"], shifted: Float[Tensor, "b l h w"], cells: int
) -> tuple[Float[Tensor, "b l h v"], Float[Tensor, "b l h v"]]:
    """The parts of two maps that show the same, the second of an image moved right by some cells."""
    if not 0 < cells < maps.shape[-1]:
        raise ValueError(
            f"a shift of {plural(cells, 'cell')} on a grid {maps.shape[-1]} wide leaves nothing"
        )
    return maps[..., :-cells], shifted[..., cells:]


def timestep_profile(of_timesteps: Mapping[int, Firings], *, seed: int = 0) -> list[dict[str, Any]]:
    """For each latent the share of cells at which it fires at each timestep, with a bootstrap over images.

    Raises:
        ValueError: the firings are of other numbers of latents or images.
    """
    found = list(of_timesteps.values())
    if len({(one.asked, one.count) for one in found}) > 1:
        raise ValueError("the stores are of other images: take a timestep profile of the same ones")
    rng = np.random.default_rng(key_seed(seed, "timestep profile"))
    latents, images = found[0].asked, found[0].count
    weights = rng.multinomial(images, np.full(images, 1 / images), SAMPLES)
    profiles: list[dict[str, Any]] = [{} for _ in range(latents)]
    peaks = np.zeros((len(found), SAMPLES, latents))
    for place, (timestep, one) in enumerate(of_timesteps.items()):
        counts = torch.bincount(one.latents * images + one.images, minlength=latents * images)
        shares = counts.view(latents, images).numpy().T / one.size
        drawn = peaks[place] = weights @ shares / images
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        for latent, profile in enumerate(profiles):
            value = float(shares[:, latent].mean())
            profile[str(timestep)] = _entry(value, low[latent], high[latent])
    order = list(of_timesteps)
    for latent, profile in enumerate(profiles):
        highest = peaks[:, :, latent].argmax(0)
        best = max(order, key=lambda t, profile=profile: profile[str(t)]["value"])
        # The share of bootstrap samples in which the same timestep has the most firings.
        profile["peak"] = {"timestep": best, "share": float((highest == order.index(best)).mean())}
    return profiles


def mask_iou(
    found: Firings,
    masks: Int64[Tensor, "images h w"],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The IoU of each latent with the class that it fits best, and the mean over latents, beside chance.

    A latent that never fires fits no class: its values are None, and no part of the mean.

    Args:
        found: where latents fire.
        masks: the class of each cell (0: none), on the grid of the firings, of the same images in order.
        seed: of the shifts and the bootstrap.

    Raises:
        ValueError: the masks are of other images or another grid, or name no class.
    """
    if tuple(masks.shape) != (found.count, *found.grid):
        raise ValueError(
            f"masks of shape {tuple(masks.shape)} for {plural(found.count, 'image')} of grid {found.grid}: "
            "give one class a cell"
        )
    classes = [one for one in masks.unique().tolist() if one != 0]
    if not classes:
        raise ValueError("the masks name no class but 0: there is nothing to compare with")
    above = _above_half(found)
    ious = _ious(found, above, masks, classes)
    rng = np.random.default_rng(key_seed(seed, "shifted masks"))
    shifted = torch.stack(
        [one.roll([int(rng.integers(side)) for side in found.grid], (0, 1)) for one in masks]
    )
    chance = _ious(found, above, shifted, classes).max(1)
    best = ious.argmax(1)
    latents: list[dict[str, Any]] = [
        {"class": classes[place], "iou": round(float(row[place]), 4), "chance": round(float(at), 4)}
        if at == at
        else {"class": None, "iou": None, "chance": None}
        for row, place, at in zip(ious, best, chance, strict=True)
    ]
    return {"latents": latents, "mean": _beside(ious.max(1), chance, seed)}


def _above_half(found: Firings) -> Bool[Tensor, " e"]:
    """Which codes are at least half of their latent's largest one."""
    highest = torch.zeros(found.asked).scatter_reduce_(0, found.latents, found.values, "amax")
    return found.values >= highest[found.latents] / 2


def _ious(
    found: Firings, above: Bool[Tensor, " e"], masks: Tensor, classes: Sequence[int]
) -> Float[np.ndarray, "l classes"]:
    """NaN: the latent never fires."""
    flat = masks.flatten(1)
    latents, at = found.latents[above], flat[found.images[above], found.cells[above]]
    fired = torch.bincount(latents, minlength=found.asked)
    columns = []
    for one in classes:
        both = torch.bincount(latents[at == one], minlength=found.asked)
        union = fired + int((flat == one).sum()) - both
        columns.append(both.double() / union)
    return torch.stack(columns, dim=1).masked_fill(fired[:, None] == 0, torch.nan).numpy()


def _beside(
    ours: Float[np.ndarray, " l"], chance: Float[np.ndarray, " l"], seed: int
) -> dict[str, Any]:
    """A mean over latents beside its chance level, and each latent's own value; None: it never fires."""
    each = [None if value != value else round(float(value), 4) for value in ours]
    found = estimate(ours, seed)
    return found | {"chance": estimate(chance, seed), "of_latents": each}


def estimate(values: Iterable[float], seed: int) -> dict[str, Any]:
    """The mean of values that are no NaN, with its 95 % bootstrap interval; None where there are none."""
    kept = np.asarray(list(values), dtype=float)
    kept = kept[~np.isnan(kept)]
    if not len(kept):
        return {"value": None, "low": None, "high": None, "latents": 0}
    rng = np.random.default_rng(key_seed(seed, "locality bootstrap", SAMPLES))
    means = [kept[rng.integers(len(kept), size=len(kept))].mean() for _ in range(SAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return _entry(float(kept.mean()), low, high) | {"latents": len(kept)}


def _entry(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": round(value, 4), "low": round(float(low), 4), "high": round(float(high), 4)}
