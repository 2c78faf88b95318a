"""Paired comparisons over images: the interval of a difference between two models, and the verdict in words.

Two models are measured on the same images, so their difference is far surer than either value. Latents share
images, so they are not independent: images are what is resampled. The images are halved and quartered at
random, many times. Halves have no image in common, so the variance of a measure on n / 2 images is

    V(n/2) = mean of (T_A - T_B)^2 / 2

without bias, however a measure depends on its images (a jackknife counts a measure's terms of second order
twice, and made the intervals of top images' purity too wide where labels say nothing). From n / 2 to n images
it falls as it did from n / 4 to n / 2, at most by a half, as a mean's, and not at all in the worst case:

    V(n) = V(n/2) min(1, max(1/2, V(n/2) / V(n/4)))

The measure on all images and Student's t, whose degrees of freedom stand for the noise of V(n), give the
interval. What it covers is in `docs/intervals.md`. Of several controls the intervals hold jointly
(Bonferroni).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from revelio.seeds import generator
from revelio.stats import t_quantile

ORDERS = 30
FREEDOM = 15
OVER_IMAGES = f"over random halves and quarters of the images ({ORDERS} orders)"
# The subsets of a random order of the images: its two halves, then its four quarters.
PARTS = (2, 4)


@dataclass(frozen=True)
class Measured:
    """One measure of one model.

    Attributes:
        whole: on all images.
        subsets: on each subset of them.
    """

    whole: float
    subsets: Float[Tensor, " subsets"]


def image_subsets(count: int, seed: int) -> Bool[Tensor, "subsets images"]:
    """Halves and quarters of ``count`` images in :data:`ORDERS` random orders."""
    draw, subsets = generator(seed, "halves and quarters"), []
    for _ in range(ORDERS):
        order = torch.randperm(count, generator=draw)
        for parts in PARTS:
            for part in order.tensor_split(parts):
                subsets.append(torch.zeros(count, dtype=torch.bool).index_fill_(0, part, True))
    return torch.stack(subsets)


def measured(
    statistic: Callable[[Bool[Tensor, " images"]], float], subsets: Bool[Tensor, "subsets images"]
) -> Measured:
    """A statistic of a set of images, on all of them and on each subset."""
    whole = statistic(torch.ones(subsets.shape[1], dtype=torch.bool))
    each = [statistic(subset) for subset in subsets]
    return Measured(whole, torch.tensor(each, dtype=torch.float64))


def difference(ours: Measured, other: Measured, confidence: float = 0.95) -> dict[str, Any]:
    """Ours minus the other's: ``value`` and ``interval``."""
    gap = Measured(ours.whole - other.whole, ours.subsets - other.subsets)
    return {"value": gap.whole, "interval": interval(gap, confidence)}


def interval(found: Measured, confidence: float = 0.95) -> list[float]:
    """Of a measure that was taken on all of :func:`image_subsets`; see the module's text."""
    halves, quarters = found.subsets.view(ORDERS, sum(PARTS)).split(PARTS, dim=1)
    variance, of_quarters = (float(parts.var(1).mean()) for parts in (halves, quarters))
    shrinking = min(1.0, max(0.5, variance / of_quarters)) if of_quarters > 0 else 1.0
    half = t_quantile(FREEDOM, confidence) * (variance * shrinking) ** 0.5
    return [found.whole - half, found.whole + half]


def against(
    ours: Measured, controls: Mapping[str, Measured], better: int, confidence: float = 0.95
) -> dict[str, Any]:
    """A measure beside the controls': plain values, fit for JSON.

    Args:
        ours: the model's.
        controls: by name.
        better: 1 where more is better, -1 where less is.
        confidence: of all intervals together (Bonferroni).
    """
    each = 1 - (1 - confidence) / max(len(controls), 1)
    entries = {
        name: {"value": other.whole, "difference": difference(ours, other, each)}
        for name, other in controls.items()
    }
    intervals = {name: entry["difference"]["interval"] for name, entry in entries.items()}
    return {
        "value": ours.whole,
        "better": "higher" if better > 0 else "lower",
        "controls": entries,
        "verdict": verdict(intervals, better),
    }


def method(confidence: float) -> str:
    """How the intervals of :func:`against` are made, in words."""
    return f"{OVER_IMAGES}, {confidence:.0%} for all controls together"


def verdict(intervals: Mapping[str, Sequence[float]], better: int) -> str:
    """What intervals of differences support: beats every control, not told apart, or beaten by some."""
    beaten, level = [], []
    for name, ends in intervals.items():
        low, high = sorted(better * end for end in ends)
        if high < 0:
            beaten.append(name)
        elif not low > 0:
            level.append(name)
    if not intervals:
        return "no control"
    if beaten:
        return f"beaten by {listed(beaten)}"
    return f"not told apart from {listed(level)}" if level else "beats every control"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
