"""Intervals and tests that the measurements of this project share; the mathematics is SciPy's."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson95(right: int, of: int) -> list[float]:
    """Wilson's 95 % score interval of the share ``right / of`` (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(right, of).proportion_ci(0.95, method="wilson")
    return [float(found.low), float(found.high)]


def t95(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of a mean share over seeds, within 0 to 1; None for fewer than two."""
    if len(values) < 2:
        return None
    half = t_quantile(len(values) - 1) * error_of_mean(values)
    return [max(0.0, mean(values) - half), min(1.0, mean(values) + half)]


def t_quantile(freedom: float, confidence: float = 0.95) -> float:
    """Student's t that a share ``confidence`` lies within, either side of 0."""
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, freedom))


def error_of_mean(values: Sequence[float]) -> float:
    """The standard error of a mean: the values' deviation over the root of how many there are."""
    from scipy.stats import sem

    return float(sem(values))


def percent(entry: Mapping[str, Any]) -> str:
    """``85.0 [79.4, 89.3]`` of an entry with ``value``, ``low`` and ``high``, which are shares."""
    value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
