"""Intervals and tests that the measurements of this project share; the distributions are SciPy's.

An accuracy is uncertain for two reasons: a test set is finite, and a training is random. One training tells
nothing about the second. For the mean accuracy p of n trainings on the same m test images, with standard
deviation s over trainings,

    error^2 = s^2 / n + p (1 - p) / m

and Student's t with the degrees of freedom of Welch and Satterthwaite gives the interval. What a training
does on single images is in both terms: it is rather too wide.

Two models that saw the same test images are compared image by image. With d_i the difference of the shares
of trainings that are right on image i, s_k and e_k the deviations of model k's accuracy over trainings and
of what is left once trainings and images have had their effects (both crossed, as readers and cases are in
studies of diagnoses),

    error^2 = var(d) / m + sum_k max(0, s_k^2 - e_k^2 / m) / n_k
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool

NOT_APART = "not told apart from"
NOT_COMPARED = "one training: not compared with"


def wilson95(right: int, of: int) -> list[float]:
    """Wilson's 95 % score interval of the share ``right / of`` (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(right, of).proportion_ci(0.95, method="wilson")
    return [float(found.low), float(found.high)]


def t_quantile(freedom: float, confidence: float = 0.95) -> float:
    """The t that Student's distribution stays within on either side with probability ``confidence``."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, freedom))


def mean95(values: Sequence[float]) -> list[float]:
    """Student's 95 % interval of a mean of two values or more."""
    half = t_quantile(len(values) - 1) * math.sqrt(_error2(values))
    return [mean(values) - half, mean(values) + half]


def t95(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of a mean share over seeds, within 0 to 1; None for fewer than two."""
    return _shares(mean95(values)) if len(values) > 1 else None


def trainings95(values: Sequence[float], of: int) -> list[float]:
    """The 95 % interval of the accuracy that trainings reach on average; see the module's text.

    Args:
        values: each training's accuracy on the same test images. Of one training alone Wilson's interval is
            given, which holds the test images' part and not the training's.
        of: how many test images.
    """
    p = mean(values)
    if len(values) < 2:
        return wilson95(round(p * of), of)
    parts = [_Part(_error2(values), len(values) - 1), _Part(p * (1 - p) / of, of - 1)]
    error, freedom = _combined(parts)
    half = t_quantile(freedom) * error
    return _shares([p - half, p + half])


@dataclass(frozen=True)
class Difference:
    """The accuracy of one model minus another's on the same test images.

    Attributes:
        value: the difference of the means over trainings.
        interval: with the confidence that was asked for.
        p: two-sided, of no difference.
        trainings: of the model that was trained less often; the interval of one does not say how much a
            training's chance matters.
    """

    value: float
    interval: tuple[float, float]
    p: float
    trainings: int


def paired(
    ours: "Bool[np.ndarray, 'trainings images']",
    theirs: "Bool[np.ndarray, 'others images']",
    confidence: float = 0.95,
) -> Difference:
    """Compare two models on the same test images, each trained once or more; see the module's text.

    Args:
        ours: which images each training got right.
        theirs: the same of the other model, in the same order of images.
        confidence: of the interval.

    Raises:
        ValueError: the test images are not as many, or fewer than two.
    """
    import numpy as np
    from scipy.stats import t

    a, b = (np.atleast_2d(np.asarray(one, dtype=float)) for one in (ours, theirs))
    images = a.shape[1]
    if images != b.shape[1] or images < 2:
        raise ValueError(
            f"a paired comparison needs the same test images, two or more, not {images} and {b.shape[1]}"
        )
    gaps = a.mean(0) - b.mean(0)
    parts = [_Part(float(gaps.var(ddof=1)) / images, images - 1)]
    for right in (a, b):
        if (n := len(right)) > 1:
            left = right - right.mean(0) - right.mean(1, keepdims=True) + right.mean()
            rest = float((left**2).sum()) / ((n - 1) * (images - 1)) / (n * images)
            parts.append(_Part(_error2(right.mean(1)), n - 1, without=rest))
    error, freedom = _combined(parts)
    value, half = float(gaps.mean()), t_quantile(freedom, confidence) * error
    p = 2 * float(t.sf(abs(value) / error, freedom)) if error else float(value == 0)
    return Difference(value, (value - half, value + half), p, min(len(a), len(b)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: together, those below 0.05 are wrong in 5 % of cases at most."""
    order = sorted(range(len(p_values)), key=lambda one: p_values[one])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, one in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[one]))
        adjusted[one] = highest
    return adjusted


def told_apart(differences: Sequence[Difference]) -> list[str]:
    """For each of several comparisons what they support together: above, below, not told apart from.

    Holm's correction is for all of them: where the best of many is compared, so are the others. A model that
    was trained once is not compared with anything, since another training might say otherwise.
    """
    adjusted = holm([one.p for one in differences])
    return [
        NOT_COMPARED if one.trainings < 2 else _word(one.value, p)
        for one, p in zip(differences, adjusted, strict=True)
    ]


def _word(value: float, p: float) -> str:
    if p >= 0.05:
        return NOT_APART
    return "above" if value > 0 else "below"


def percent(entry: Mapping[str, Any]) -> str:
    """``85.0 [79.4, 89.3]`` of an entry with ``value``, ``low`` and ``high``, which are shares."""
    value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def proportion(right: int, of: int) -> dict[str, float]:
    """A share with Wilson's interval, an entry for :func:`percent`."""
    return rounded(right / of, wilson95(right, of))


def rounded(value: float, interval: Sequence[float]) -> dict[str, float]:
    """An entry for :func:`percent`, to four digits."""
    low, high = interval
    return {"value": round(value, 4), "low": round(low, 4), "high": round(high, 4)}


@dataclass(frozen=True)
class _Part:
    """A squared error, its degrees of freedom, and how much of it another part holds already."""

    error2: float
    freedom: int
    without: float = 0.0


def _error2(values: "Sequence[float] | np.ndarray") -> float:
    """The squared standard error of a mean of independent values."""
    import numpy as np

    return float(np.var(values, ddof=1)) / len(values)


def _combined(parts: Sequence[_Part]) -> tuple[float, float]:
    """The error of a sum of independent parts, and its degrees of freedom."""
    total = sum(max(0.0, part.error2 - part.without) for part in parts)
    spread = sum(part.error2**2 / part.freedom for part in parts)
    return math.sqrt(total), (total**2 / spread if total else math.inf)


def _shares(interval: Sequence[float]) -> list[float]:
    return [min(1.0, max(0.0, end)) for end in interval]
