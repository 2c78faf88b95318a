"""Linear probe: how well a logistic regression reads the class off frozen activations.

Activations are standardised by the labelled rows; the one setting, the regression's C, is chosen
on rows that are neither labelled nor tested, the same way for every kind of activation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from revelio.mini.intervals import repeated

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
SEEDS = 5


@dataclass(frozen=True)
class ProbeData:
    """Rows `(n, d)` and labels `(n,)`: a pool to draw labelled rows from, and the test."""

    pool: np.ndarray
    pool_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def draw(labels: np.ndarray, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `per_class` images of every class, and all the other rows.

    Raises:
        ValueError: A class has fewer than `per_class` + 1 rows.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).numpy()
    chosen = []
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        if len(rows) <= per_class:
            raise ValueError(f"class {label} has {len(rows)} rows, {per_class + 1} are needed")
        chosen.append(rows[:per_class])
    labelled = np.concatenate(chosen)
    return labelled, np.setdiff1d(order, labelled)


def accuracy(
    data: ProbeData, labelled: np.ndarray, rows: tuple[np.ndarray, np.ndarray], strength: float
) -> float:
    """Accuracy on `rows` (activations, labels) of a probe fitted to the labelled rows of the pool."""
    scaler = StandardScaler().fit(data.pool[labelled])
    model = LogisticRegression(C=strength, max_iter=300)
    with warnings.catch_warnings():
        # 300 steps are enough for the third digit; the same limit holds for all that is compared.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(scaler.transform(data.pool[labelled]), data.pool_labels[labelled])
    return float(model.score(scaler.transform(rows[0]), rows[1]))


def probe(data: ProbeData, per_class: int, seeds: int = SEEDS) -> dict[str, object]:
    """Mean accuracy over draws of labelled rows, with its interval.

    Args:
        data: Pool and test.
        per_class: Labelled images a class.
        seeds: How many draws; C is chosen on the first one's spare rows of the pool.
    """
    labelled, spare = draw(data.pool_labels, per_class, 0)
    others = (data.pool[spare], data.pool_labels[spare])
    strength = max(STRENGTHS, key=lambda c: accuracy(data, labelled, others, c))
    test = (data.test, data.test_labels)
    found = [
        accuracy(data, draw(data.pool_labels, per_class, seed)[0], test, strength)
        for seed in range(seeds)
    ]
    return {
        **repeated(found, len(data.test_labels)),
        "per_class": per_class,
        "C": strength,
        "by_seed": [round(value, 4) for value in found],
    }
