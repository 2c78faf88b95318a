"""95 % intervals of the mini models' figures."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

Z = 1.959964


def proportion(right: int, of: int) -> dict[str, float]:
    """A share with its Wilson interval (Wilson 1927).

    Args:
        right: How many were right.
        of: Out of how many.
    """
    share = right / of
    spread = Z * Z / of
    middle = (share + spread / 2) / (1 + spread)
    half = Z * sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return {
        "value": round(share, 4),
        "low": round(max(0.0, middle - half), 4),
        "high": round(min(1.0, middle + half), 4),
    }


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
    half = Z * sqrt(variance / len(values) + mean * (1 - mean) / of)
    return {
        "value": round(mean, 4),
        "low": round(max(0.0, mean - half), 4),
        "high": round(min(1.0, mean + half), 4),
    }
