"""Rows of labelled images taken apart class by class, the same way every time."""

import numpy as np
import torch

from revelio.wording import plural


def draw(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``per_class`` images of every class, and all the other rows.

    Args:
        labels: a class a row, (n,).
        per_class: how many rows of each class are drawn.
        seed: of the draw.

    Raises:
        ValueError: a class has fewer than ``per_class`` + 1 rows.
    """
    counts = {int(label): per_class for label in np.unique(labels)}
    return _drawn(labels, counts, seed)


def validation_part(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit to, and a share of every class, at least one row, to choose settings on.

    Raises:
        ValueError: a class has only one row.
    """
    names, sizes = np.unique(labels, return_counts=True)
    counts = {
        int(label): max(1, round(share * int(size)))
        for label, size in zip(names, sizes, strict=True)
    }
    held, fitted = _drawn(labels, counts, seed)
    return fitted, held


def _drawn(labels: np.ndarray, counts: dict[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    chosen = []
    for label, count in counts.items():
        rows = order[labels[order] == label]
        if len(rows) <= count:
            raise ValueError(
                f"class {label} has {plural(len(rows), 'image')}, {count + 1} are needed: give more of it, "
                "or leave it out"
            )
        chosen.append(rows[:count])
    drawn = np.concatenate(chosen)
    return drawn, np.setdiff1d(order, drawn)
