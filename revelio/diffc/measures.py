"""How good a classifier is: top-1, accuracy by class, confusion (counts, picture), and two intervals.

``wilson95`` says how far the top-1 of one trained model could be off because the test set is finite
(Wilson's score interval of a binomial share). ``t95`` says how far the mean over several seeds could be
off because training is random (Student's t over seeds). Neither contains the other;
:func:`revelio.stats.trainings95` holds both.
"""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from revelio.charts import heat_map
from revelio.stats import t95, wilson95

DARK = "#14346e"  # a row's share of 1
SIDE, LARGEST_CELL, FONT, NAMED = 760, 48, 12, 60


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
        accuracies), ``per_class``, a list of ``{name, images, accuracy}`` of the classes that occur, and
        ``wrong``, the numbers of the images that were not taken for what they are.
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
        "wrong": (labels != predicted).nonzero().flatten().tolist(),
    }


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of top-1 over seeds with its interval."""
    return {"mean": mean(values), "t95": t95(values), "seeds": len(values), "values": list(values)}


CAPTION = "rows: true class; columns: taken for; shade: share of the row"


def confusion_png(counts: Int64[Tensor, "classes classes"], names: Sequence[str]) -> bytes:
    """Draw the matrix with each row as shares of its class; the file's bytes.

    Counts are written into cells that have room, names beside up to 60 classes.
    """
    classes = len(names)
    cell = max(3, min(LARGEST_CELL, SIDE // classes))
    font = min(FONT, max(8, cell - 2))
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)

    def text(count: int) -> str:
        return str(count) if count and len(str(count)) * 0.7 * font < cell - 2 else ""

    shown = names if classes <= NAMED else ()
    return heat_map(
        (shares**0.7).numpy(), [list(map(text, row)) for row in counts.tolist()], (shown, shown),
        cell=(cell, cell), dark=DARK, caption=CAPTION, font=font, upright=True,
    )  # fmt: skip
