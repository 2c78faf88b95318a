"""Which latents nearly repeat another of the same k-SAE, and which come back in another run.

Many latents may be one feature many times over, and none may be a feature at all: a latent counts for more
where nothing else in the dictionary says the same, and where a training from another seed finds it again.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.seeds import key_seed
from revelio.stats import proportion
from revelio.wording import plural

if TYPE_CHECKING:
    from revelio.analysis.top_images import TopImages
    from revelio.sae.model import KSparseAutoencoder

# Decoder rows or top images that agree by more than this are nearly the same.
SAME_DIRECTION = 0.9
SAME_IMAGES = 0.5
# Two runs' latents are partners above this cosine (Paulo & Belrose 2025).
PARTNER = 0.7


def redundancy(
    model: "KSparseAutoencoder", top: "TopImages", latents: int = 1000
) -> dict[str, Any]:
    """The share of the strongest latents that nearly repeat a stronger one, with Wilson's interval.

    A latent repeats another whose decoder row has a cosine above 0.9 with its own, or that shares more than
    half of the images of either's top ones (Jaccard). Chance is what rows and images that are shuffled over
    the latents give.
    """
    chosen = top.ranking(latents)
    rows = torch.nn.functional.normalize(model.W_dec.detach().cpu().float()[chosen], dim=1)
    images = top.indices[chosen]
    source = torch.Generator().manual_seed(key_seed("redundancy"))
    mixed = images.flatten()[torch.randperm(images.numel(), generator=source)].view(images.shape)
    turned = rows[:, torch.randperm(rows.shape[1], generator=source)]
    repeats = {
        "by_direction": _repeats(rows @ rows.T, SAME_DIRECTION),
        "by_images": _repeats(_jaccard(images), SAME_IMAGES),
    }
    either = repeats["by_direction"] | repeats["by_images"]
    chance = {
        "by_direction": _repeats(rows @ turned.T, SAME_DIRECTION),
        "by_images": _repeats(_jaccard(mixed), SAME_IMAGES),
    }
    count = max(len(chosen), 1)
    found = {
        name: proportion(int(repeats[name].sum()), count)
        | {"chance": proportion(int(chance[name].sum()), count)}
        for name in repeats
    }
    return found | {
        "redundant": proportion(int(either.sum()), count),
        "distinct": int((~either).sum()),
        "latents": len(chosen),
    }


def _repeats(alike: Float[Tensor, "l l"], least: float) -> Bool[Tensor, " l"]:
    """Which entries are like an earlier one."""
    return (alike.tril(-1) > least).any(1)


def _jaccard(images: Int64[Tensor, "l m"]) -> Float[Tensor, "l l"]:
    """Shared images over all images of two latents' top ones; -1 stands for none."""
    count = int(images.max()) + 1 if images.numel() else 0
    member = torch.zeros(len(images), max(count, 1) + 1)
    member.scatter_(1, images.where(images >= 0, torch.full_like(images, max(count, 1))), 1.0)
    member = member[:, :-1]
    shared, sizes = member @ member.T, member.sum(1)
    return shared / (sizes[:, None] + sizes - shared).clamp(min=1)


def partners(
    model: "KSparseAutoencoder", other: "KSparseAutoencoder", latents: Int64[Tensor, " l"]
) -> dict[str, Any]:
    """The share of latents that have a partner of cosine above 0.7 in another run, beside random directions.

    ``of_latents``: the largest cosine of each, between directions in the scale that the k-SAE was trained in.

    Raises:
        ValueError: the k-SAEs are of other widths, or of several stores that they scale differently.
    """
    if model.d != other.d:
        raise ValueError(f"k-SAEs of widths {model.d} and {other.d} have no latents in common")
    normalize = torch.nn.functional.normalize
    rows = normalize(model.W_dec.detach().cpu().float()[latents], dim=1)
    theirs = normalize(_rescaled(other.W_dec.detach().cpu().float(), other, model), dim=1)
    source = torch.Generator().manual_seed(key_seed("random partners"))
    random = normalize(torch.randn(theirs.shape, generator=source), dim=1)
    ours, chance = (_highest(rows, directions) for directions in (theirs, random))
    share, at_random = (proportion(int((one > PARTNER).sum()), len(rows)) for one in (ours, chance))
    each = [round(value, 4) for value in ours.tolist()]
    return share | {"chance": at_random, "of_latents": each}


def _rescaled(
    directions: Float[Tensor, "n d"], of: "KSparseAutoencoder", to: "KSparseAutoencoder"
) -> Float[Tensor, "n d"]:
    """Directions of one k-SAE as another, which normalizes otherwise, has them; but for their length."""
    ours, theirs = ([one.scale for one in each.inputs] for each in (to, of))
    if ours == theirs or all(len(scale) == 1 for scale in ours + theirs):
        return directions  # one number changes no direction
    if len(ours) > 1 or len(theirs) > 1:
        raise ValueError(
            f"the k-SAEs normalize {len(ours)} and {plural(len(theirs), 'store')}, each in its own way: "
            "compare ones of the same stores, or of one store"
        )
    for scale in theirs:
        directions = directions * directions.new_tensor(scale)
    for scale in ours:
        directions = directions / directions.new_tensor(scale)
    return directions


def _highest(rows: Tensor, directions: Tensor) -> Float[Tensor, " l"]:
    """The largest cosine of each row, some rows at a time."""
    return torch.cat([(part @ directions.T).max(1).values for part in rows.split(1024)])
