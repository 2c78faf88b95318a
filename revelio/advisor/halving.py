"""Successive halving: everything on a few images, then more images for what is still in the race.

Many candidates are as good as each other, and which of them is highest changes with every image. So the one
that is preferred is the cheapest of the contenders, whose difference to the best, paired on the same images,
may be zero; equally cheap ones come in an order of the caller's.

After each round a candidate leaves that is surely worse than the best (all comparisons of the round together
by Holm's correction); and of the passes only one in ``growth`` stay, those of the preferred candidates, which
need not be surely better: that is the price of not measuring everything on everything (Jamieson and Talwalkar
2016, Alg. 1). Layers of one pass cost nothing more, so that it is passes that are counted; after the first
round, on few images, any layer that is a contender speaks for its pass. Passes of one model are much alike,
but a model that left would be heard no more: of each one pass stays beyond that number, until all its
candidates are surely worse. The race ends early where one candidate is surely better than all others.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Num

from revelio.advisor.measures import Measured
from revelio.seeds import key_seed
from revelio.stats import holm, paired, t_quantile

K = TypeVar("K", bound=Hashable)
WORSE, SPARED = "surely worse", "behind, to spare passes"
RESAMPLES = 1000
# The first round has few images: two passes stay at least.
LEAST_PASSES = 2


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        images: how many images every candidate in it was measured on.
        found: what was measured.
        left: the candidates that leave after it, and why.
    """

    images: int
    found: Mapping[Any, Measured]
    left: Mapping[Any, str]


def _one_model(candidate: Hashable) -> None:
    """What all candidates share where nobody says which model they are of."""


def most_passes(passes: int, growth: int, *, first: bool) -> int:
    """How many of a round's passes stay, beside one of each model that has none among them."""
    return max(LEAST_PASSES if first else 1, ceil(passes / growth))


def sizes(first: int, total: int, growth: int) -> list[int]:
    """How many images each round has: ``growth`` times as many as the one before, and in the end all."""
    found = [min(first, total)]
    while found[-1] < total:
        grown = found[-1] * growth
        # A last round of hardly more images would decide nothing.
        found.append(total if grown * 1.5 > total else grown)
    return found


def halve(
    candidates: Sequence[K],
    measured: Callable[[Sequence[K], int], Mapping[K, Measured]],
    images: Sequence[int],
    *,
    by: str,
    pass_of: Callable[[K], Hashable],
    model_of: Callable[[K], Hashable] = _one_model,
    growth: int,
    confidence: float,
) -> list[Round]:
    """Race the candidates.

    Args:
        candidates: what is compared, the cheapest first.
        measured: measures some of them on the first so many images.
        images: how many in each round.
        by: the probe, or the number, that decides; more is better.
        pass_of: the model pass that a candidate comes from.
        model_of: the model that it comes from; left out, all come from one.
        growth: one in so many passes stays.
        confidence: of the contenders' intervals, and of all that leave in a round as surely worse, together.
    """
    rounds, racing = [], list(candidates)
    for number, count in enumerate(images):
        found = measured(racing, count)
        last = number == len(images) - 1
        left = (
            {}
            if last
            else leaving(
                found, by, pass_of, growth, confidence, first=not number, model_of=model_of
            )
        )
        rounds.append(Round(count, found, left))
        racing = [one for one in racing if one not in left]
        if len(racing) == 1:
            break
    return rounds


def leaving(
    found: Mapping[K, Measured],
    by: str,
    pass_of: Callable[[K], Hashable],
    growth: int,
    confidence: float,
    *,
    first: bool,
    model_of: Callable[[K], Hashable] = _one_model,
) -> dict[K, str]:
    """Who leaves after a round (the first has few images, and leaves two passes at least), and why."""
    best, *others = ranked(found, by)
    left: dict[K, str] = {}
    if others and by in found[best].right:
        gaps = [paired(found[best].right[by], found[one].right[by]) for one in others]
        adjusted = holm([gap.p for gap in gaps])
        surely = (p < 1 - confidence for p in adjusted)
        left = {one: WORSE for one, sure in zip(others, surely, strict=True) if sure}
    order = preferred(found, by, confidence)
    if first:
        likely = {pass_of(one) for one in contenders(found, by, confidence)}
        order = [one for one in found if pass_of(one) in likely] + order
    racing = [one for one in order if one not in left]
    most = most_passes(len({pass_of(one) for one in found}), growth, first=first)
    stay = set(list(dict.fromkeys(pass_of(one) for one in racing))[:most])
    heard = {model_of(one) for one in racing if pass_of(one) in stay}
    for one in racing:
        if model_of(one) not in heard:
            heard.add(model_of(one))
            stay.add(pass_of(one))
    return left | {one: SPARED for one in racing if pass_of(one) not in stay}


def ranked(found: Mapping[K, Measured], by: str) -> list[K]:
    """The candidates from best to worst; equal ones in the order they came."""
    return sorted(found, key=lambda one: -found[one].value(by))


def contenders(found: Mapping[K, Measured], by: str, confidence: float) -> list[K]:
    """The candidates that are not told apart from the best, in the order they came.

    Each is compared by its own interval, not by all together: what is recommended should not cost accuracy.
    Where nothing can be paired, which is without labels, the best alone.
    """
    best = ranked(found, by)[0]
    if by not in found[best].right:
        return [best]
    right = np.stack([one.right[by] for one in found.values()]).astype(float)
    apart = _behind(right, np.ones(right.shape[1]), confidence)
    return [one for one, far in zip(found, apart, strict=True) if not far]


def preferred(found: Mapping[K, Measured], by: str, confidence: float) -> list[K]:
    """The contenders in the order they came, which is the cheapest first; then the others, the best first."""
    first = contenders(found, by, confidence)
    return first + [one for one in ranked(found, by) if one not in first]


def share_again(found: Mapping[K, Measured], by: str, confidence: float, seed: int) -> float:
    """In what share of resamples of the images the preferred candidate is preferred again."""
    right = np.stack([one.right[by] for one in found.values()]).astype(float)
    count = right.shape[1]
    draw = np.random.default_rng(key_seed(seed, "resamples"))
    weights = draw.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    same = list(found).index(preferred(found, by, confidence)[0])
    return float(np.mean([_behind(right, one, confidence).argmin() == same for one in weights]))


def _behind(
    right: Float[np.ndarray, "candidates images"],
    weights: Num[np.ndarray, " images"],
    confidence: float,
) -> Bool[np.ndarray, " candidates"]:
    """Whose paired interval of the best's accuracy minus its own lies above zero; images count by weight."""
    count = weights.sum()
    gaps = right[(right @ weights).argmax()] - right
    means = gaps @ weights / count
    variances = (gaps**2 @ weights / count - means**2) * count / (count - 1)
    half = t_quantile(count - 1, confidence) * np.sqrt(np.maximum(variances, 0) / count)
    return means > half + 1e-12
