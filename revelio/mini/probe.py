"""Linear probe: how well a linear classifier reads the class off frozen activations.

Ridge regression on one-hot classes, in its dual form, which is exact and takes a second for a
thousand rows of any width: scores = x X^T (X X^T + strength I)^-1 Y for standardised rows x / sqrt(d).
Standardised by the labelled rows; the one setting, `strength`, is chosen on rows that are neither
labelled nor tested, the same way for every kind of activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from revelio.mini.intervals import repeated

STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)
SEEDS = 10


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


def accuracies(
    data: ProbeData, labelled: np.ndarray, rows: np.ndarray, labels: np.ndarray
) -> dict[float, float]:
    """Accuracy on `rows (m, d)` for every strength, fitted to the labelled rows of the pool."""
    chosen = data.pool[labelled].astype(np.float64)
    mean, spread = chosen.mean(0), chosen.std(0)
    # A column that never varies among the labelled rows tells nothing: it becomes zero everywhere.
    scale = np.where(spread > 1e-8, 1.0 / np.maximum(spread, 1e-8), 0.0) / np.sqrt(chosen.shape[1])
    known, asked = (chosen - mean) * scale, (rows - mean) * scale
    classes = np.unique(data.pool_labels)
    targets = (data.pool_labels[labelled][:, None] == classes).astype(np.float64)
    offset = targets.mean(0)
    values, vectors = np.linalg.eigh(known @ known.T)
    seen, turned = asked @ known.T @ vectors, vectors.T @ (targets - offset)
    found = {}
    for strength in STRENGTHS:
        scores = seen @ (turned / (values + strength)[:, None]) + offset
        found[strength] = float((classes[scores.argmax(1)] == labels).mean())
    return found


def probe(data: ProbeData, per_class: int, seeds: int = SEEDS) -> dict[str, object]:
    """Mean accuracy over draws of labelled rows, with its interval.

    Args:
        data: Pool and test.
        per_class: Labelled images a class.
        seeds: How many draws; `strength` is chosen on the first one's spare rows of the pool.
    """
    labelled, spare = draw(data.pool_labels, per_class, 0)
    tried = accuracies(data, labelled, data.pool[spare], data.pool_labels[spare])
    strength = max(tried, key=lambda key: tried[key])
    found = []
    for seed in range(seeds):
        chosen = draw(data.pool_labels, per_class, seed)[0]
        found.append(accuracies(data, chosen, data.test, data.test_labels)[strength])
    return {
        **repeated(found, len(data.test_labels)),
        "per_class": per_class,
        "strength": strength,
        "by_seed": [round(value, 4) for value in found],
    }
