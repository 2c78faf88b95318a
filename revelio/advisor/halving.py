"""Successive halving: everything on a few images, then more images for what is still in the race.

After each round a candidate leaves that is surely worse than the best (paired on the same images, all
comparisons together by Holm's correction); and of the passes of the model only the best one in ``growth``
stay, which need not be surely better: that is the price of not measuring everything on everything (Jamieson
and Talwalkar 2016, Alg. 1). Layers of one pass cost nothing more, so that it is passes that are counted. The
race ends early where one candidate is surely better than all others.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

import numpy as np

from revelio.advisor.measures import Measured
from revelio.seeds import key_seed
from revelio.stats import holm, paired

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
    growth: int,
    confidence: float,
) -> list[Round]:
    """Race the candidates.

    Args:
        candidates: what is compared.
        measured: measures some of them on the first so many images.
        images: how many in each round.
        by: the probe, or the number, that decides; more is better.
        pass_of: the model pass that a candidate comes from.
        growth: one in so many passes stays.
        confidence: of all that leave a round as surely worse, together.
    """
    rounds, racing = [], list(candidates)
    for number, count in enumerate(images):
        found = measured(racing, count)
        last = number == len(images) - 1
        least = 1 if number else LEAST_PASSES
        left = {} if last else leaving(found, by, pass_of, growth, confidence, least)
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
    least: int = LEAST_PASSES,
) -> dict[K, str]:
    """Who leaves after a round, and why; ``least`` passes stay, as far as they are not surely worse."""
    order = ranked(found, by)
    best, *others = order
    left: dict[K, str] = {}
    if others and by in found[best].right:
        gaps = [paired(found[best].right[by], found[one].right[by]) for one in others]
        adjusted = holm([gap.p for gap in gaps])
        surely = (p < 1 - confidence for p in adjusted)
        left = {one: WORSE for one, sure in zip(others, surely, strict=True) if sure}
    racing = [one for one in order if one not in left]
    passes = list(dict.fromkeys(pass_of(one) for one in order))
    most = max(least, ceil(len(passes) / growth))
    stay = set(list(dict.fromkeys(pass_of(one) for one in racing))[:most])
    return left | {one: SPARED for one in racing if pass_of(one) not in stay}


def ranked(found: Mapping[K, Measured], by: str) -> list[K]:
    """The candidates from best to worst; equal ones in the order they came."""
    return sorted(found, key=lambda one: -found[one].value(by))


def share_first(found: Mapping[K, Measured], by: str, seed: int) -> float:
    """In what share of resamples of the images the best candidate comes first again; ties count in part."""
    order = ranked(found, by)
    right = np.stack([found[one].right[by] for one in order]).astype(float)
    count = right.shape[1]
    draw = np.random.default_rng(key_seed(seed, "resamples"))
    weights = draw.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    values = weights @ right.T
    first = values >= values.max(1, keepdims=True) - 1e-9
    return float((first[:, 0] / first.sum(1)).mean())
