"""Paired comparisons over images: the interval of a difference between two models, and the verdict in words.

Two models are measured on the same images, so their difference is far surer than either value. Latents share
images, so they are not independent: images are what is resampled. They are halved at random, many times.
Halves have no image in common, so the variance of a measure on n / 2 images is

    V(n/2) = mean of (T_A - T_B)^2 / 2

without bias, however a measure depends on its images (a jackknife counts a measure's terms of second order
twice, which made intervals too wide where labels say nothing). On n images it is V(n/2) / 2 for what is a
mean over images. A measure of top images has as many of them in a half, and a count of classes above a bound
does not become surer by the square root: V(n) is taken as V(n/2).

Where labels say nothing this is too little for what is nearly linear in the labels of top images, sigma
above all. Its variance is then as the sum over images of (a_i - b_i)^2, a_i and b_i how many top images of
either model's latents image i is. Ten images of n / 2 lie less far out than ten of n, and there latents share
fewer of them. But where labels say nothing, any order of them was as likely: the variance is that over
permutations of the labels, on all images and the same for both models. Where labels matter it lacks the
chance of which images are the top ones, and is smaller than V(n/2). So it is a floor:

    V(n) = max(V(n/2), variance of T over permuted labels)

The measure on all images and Student's t, whose degrees of freedom stand for the noise of V, give the
interval. What it covers is in `docs/intervals.md`. Of several controls the intervals hold jointly
(Bonferroni).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.seeds import generator
from revelio.stats import t_quantile

BEATS = "beats every control"
# Random orders of the images that are halved, and the t's degrees of freedom.
ORDERS, FREEDOM = 50, 30
# Permutations of the labels.
SHUFFLES = 100
OVER_IMAGES = (
    f"over random halves of the images ({ORDERS} times), purity's no narrower than over permuted labels "
    f"({SHUFFLES} times)"
)
# The delete-d jackknife of what is replicated image by image (:mod:`revelio.reproduce.orderings`).
SUBSETS, LEFT_OUT = 50, 0.25


@dataclass(frozen=True)
class Measured:
    """One measure of one model.

    Attributes:
        whole: on all images.
        subsets: on each of :func:`halves`.
        steady: whether its variance is taken not to fall with the number of images.
        shuffled: on all images, with each of :func:`shuffles` for labels; None where that is no floor.
    """

    whole: float
    subsets: Float[Tensor, " subsets"]
    steady: bool = False
    shuffled: Float[Tensor, " shuffles"] | None = None


def halves(count: int, seed: int) -> Bool[Tensor, "subsets images"]:
    """Both halves of ``count`` images, in :data:`ORDERS` random orders."""
    draw, first = generator(seed, "halves"), torch.zeros(ORDERS, count, dtype=torch.bool)
    for half in first:
        half[torch.randperm(count, generator=draw)[: count // 2]] = True
    return torch.stack([first, ~first], dim=1).flatten(0, 1)


def shuffles(labels: Int64[Tensor, " images"], seed: int) -> Int64[Tensor, "shuffles images"]:
    """The labels in :data:`SHUFFLES` random orders: of the same labels and seed the same for every model."""
    draw = generator(seed, "label shuffles")
    return torch.stack(
        [labels[torch.randperm(len(labels), generator=draw)] for _ in range(SHUFFLES)]
    )


def image_subsets(count: int, seed: int) -> Bool[Tensor, "subsets images"]:
    """:data:`SUBSETS` random subsets of ``count`` images, each without a quarter of them: a jackknife's."""
    draw, out = generator(seed, "jackknife subsets"), round(count * LEFT_OUT)
    kept = torch.ones(SUBSETS, count, dtype=torch.bool)
    for subset in kept:
        subset[torch.randperm(count, generator=draw)[:out]] = False
    return kept


def measured(
    statistic: Callable[[Bool[Tensor, " images"]], float],
    subsets: Bool[Tensor, "subsets images"],
    *,
    steady: bool = False,
) -> Measured:
    """A statistic of a set of images, on all of them and on each subset."""
    whole = statistic(torch.ones(subsets.shape[1], dtype=torch.bool))
    each = [statistic(subset) for subset in subsets]
    return Measured(whole, torch.tensor(each, dtype=torch.float64), steady)


def defined(found: Measured) -> Measured | None:
    """The measure; None where it says nothing (NaN) on some subset: then it has no interval."""
    values = [found.whole, *found.subsets.tolist()]
    return found if all(map(math.isfinite, values)) else None


def difference(ours: Measured, other: Measured, confidence: float = 0.95) -> dict[str, Any]:
    """Ours minus the other's: ``value`` and ``interval``."""
    shuffled = None
    if ours.shuffled is not None and other.shuffled is not None:
        shuffled = ours.shuffled - other.shuffled
    gap = Measured(ours.whole - other.whole, ours.subsets - other.subsets, ours.steady, shuffled)
    return {"value": gap.whole, "interval": interval(gap, confidence)}


def interval(found: Measured, confidence: float = 0.95) -> list[float]:
    """Of a measure that was taken on :func:`halves`, and maybe :func:`shuffles`; see the module's text."""
    of_half = float(found.subsets.view(ORDERS, 2).var(1).mean())
    variance = of_half if found.steady else of_half / 2
    if found.shuffled is not None:
        variance = max(variance, float(found.shuffled.var()))
    half = t_quantile(FREEDOM, confidence) * variance**0.5
    return [found.whole - half, found.whole + half]


def within(ends: Sequence[float], low: float, high: float) -> list[float]:
    """An interval without what the measure can't be."""
    return [min(max(end, low), high) for end in ends]


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
    return f"not told apart from {listed(level)}" if level else BEATS


def strongest(entry: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The control that comes best in a measure, by name, of :func:`against`'s entry; None of no control."""
    sign, controls = 1 if entry["better"] == "higher" else -1, entry["controls"]
    if not controls:
        return None
    best = max(controls, key=lambda name: sign * controls[name]["value"])
    return best, controls[best]


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
