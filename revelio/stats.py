"""The interval of a share: how far an accuracy could be off because the test set is finite."""

import math
from collections.abc import Mapping
from typing import Any

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson95(right: int, of: int) -> list[float]:
    """Wilson's 95 % score interval of the share ``right / of`` (Wilson 1927)."""
    share, z2 = right / of, Z95**2
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z95 / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def percent(entry: Mapping[str, Any]) -> str:
    """``85.0 [79.4, 89.3]`` of an entry with ``value``, ``low`` and ``high``, which are shares."""
    value, low, high = (100 * entry[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
