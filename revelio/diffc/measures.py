"""How good a classifier is: top-1, accuracy by class, confusion, and two kinds of interval.

``wilson95`` says how far the top-1 of one trained model could be off because the test set is finite
(Wilson's score interval of a binomial share). ``t95`` says how far the mean over several seeds could be
off because training is random (Student's t over seeds). Neither contains the other.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from revelio.stats import wilson95


def t95(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of a mean share over seeds, within 0 to 1; None for fewer than two."""
    if len(values) < 2:
        return None
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return [max(0.0, mean(values) - half), min(1.0, mean(values) + half)]


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection (a tenth of what importing SciPy takes).

    With t = sqrt(freedom) tan(a), the density becomes one of a: cos(a)^(freedom - 1), up to its norm.
    """
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        middle = (low + high) / 2
        if norm * _cosine_integral(freedom - 1, middle) < 0.475:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _cosine_integral(power: int, end: float, pieces: int = 400) -> float:
    """Simpson's rule for cos(a)^power from 0 to ``end``."""
    heights = [math.cos(end * i / pieces) ** power for i in range(pieces + 1)]
    inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return end / pieces / 3 * (heights[0] + inner + heights[-1])


def confusion(
    labels: Int64[Tensor, " n"], predicted: Int64[Tensor, " n"], classes: int
) -> Int64[Tensor, "classes classes"]:
    """How many images of class (row) were taken for class (column)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def measure(
    labels: Int64[Tensor, " n"], predicted: Int64[Tensor, " n"], names: Sequence[str]
) -> dict[str, Any]:
    """Top-1 with its interval and the accuracy of every class; shares are from 0 to 1.

    Returns:
        ``top1``, ``wilson95``, ``correct``, ``images``, ``class_mean`` (the mean of the classes' own
        accuracies) and ``per_class``, a list of ``{name, images, accuracy}`` of the classes that occur.
    """
    counts = confusion(labels, predicted, len(names))
    correct, images = int(counts.trace()), int(counts.sum())
    rows = zip(names, counts.sum(dim=1).tolist(), counts.diagonal().tolist(), strict=True)
    per_class = [
        {"name": n, "images": all_, "accuracy": hit / all_} for n, all_, hit in rows if all_
    ]
    return {
        "top1": correct / images,
        "wilson95": wilson95(correct, images),
        "correct": correct,
        "images": images,
        "class_mean": mean(row["accuracy"] for row in per_class),
        "per_class": per_class,
    }


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of top-1 over seeds with its interval."""
    return {"mean": mean(values), "t95": t95(values), "seeds": len(values), "values": list(values)}
