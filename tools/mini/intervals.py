"""95 % intervals of the mini models' figures."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from revelio.stats import Z95, wilson95


def proportion(right: int, of: int) -> dict[str, float]:
    """A share with its Wilson interval.

    Args:
        right: How many were right.
        of: Out of how many.
    """
    low, high = wilson95(right, of)
    return {"value": round(right / of, 4), "low": round(low, 4), "high": round(high, 4)}


def repeated(values: Sequence[float], of: int) -> dict[str, float]:
    """The mean of accuracies over draws of labels, all on the same test images.

    Both chances count, which labels were drawn and which images are tested:
    half width = z sqrt(s^2 / n + p (1 - p) / of).

    Args:
        values: One accuracy a draw of labels, two or more.
        of: Number of test images.
    """
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = Z95 * sqrt(variance / len(values) + mean * (1 - mean) / of)
    return {
        "value": round(mean, 4),
        "low": round(max(0.0, mean - half), 4),
        "high": round(min(1.0, mean + half), 4),
    }
