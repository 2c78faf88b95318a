"""Linear probe: how well a linear classifier reads the class off frozen activations.

Ridge regression on one-hot classes, in its dual form, which is exact and takes a second for a
thousand rows of any width: scores = x X^T (X X^T + strength I)^-1 Y for standardised rows x / sqrt(d).
Standardised by the labelled rows; the one setting, `strength`, is chosen on rows that are neither
labelled nor tested, the same way for every kind of activation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import mean

import numpy as np
import torch

from revelio.probes.split import draw
from revelio.stats import rounded, trainings95

STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0)
SEEDS = 10


@dataclass(frozen=True)
class ProbeData:
    """Rows `(n, d)` and labels `(n,)`: a pool to draw labelled rows from, and the test."""

    pool: np.ndarray
    pool_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Problem:
    """One fit: labelled rows `known (l, d)`, standardised by `mean` and `scale`; `targets`, centred."""

    known: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    targets: np.ndarray
    offset: np.ndarray
    classes: np.ndarray

    def accuracy(self, dual: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> float:
        """Of the scores that dual coefficients `(l, classes)` give `rows (m, d)`."""
        # The weights are scaled, not the rows, which are many.
        weights = self.scale[:, None] * (self.known.T @ dual)
        scores = rows @ weights + (self.offset - self.mean @ weights)
        return float((self.classes[scores.argmax(1)] == labels).mean())


def pose(data: ProbeData, labelled: np.ndarray) -> Problem:
    """The fit to labelled rows of the pool."""
    chosen = data.pool[labelled].astype(np.float64)
    mean, spread = chosen.mean(0), chosen.std(0)
    # A column that never varies among the labelled rows tells nothing: it becomes zero everywhere.
    scale = np.where(spread > 1e-8, 1.0 / np.maximum(spread, 1e-8), 0.0) / np.sqrt(chosen.shape[1])
    classes = np.unique(data.pool_labels)
    targets = (data.pool_labels[labelled][:, None] == classes).astype(np.float64)
    offset = targets.mean(0)
    return Problem((chosen - mean) * scale, mean, scale, targets - offset, offset, classes)


def best_strength(data: ProbeData, labelled: np.ndarray, spare: np.ndarray) -> float:
    """The strength that serves other rows of the pool best; one decomposition tries them all."""
    problem = pose(data, labelled)
    rows, labels = data.pool[spare].astype(np.float64), data.pool_labels[spare]
    values, vectors = np.linalg.eigh(problem.known @ problem.known.T)
    turned = vectors.T @ problem.targets
    found = {
        strength: problem.accuracy(vectors @ (turned / (values + strength)[:, None]), rows, labels)
        for strength in STRENGTHS
    }
    return max(found, key=lambda strength: found[strength])


def held_out_accuracy(data: ProbeData, labelled: np.ndarray, strength: float) -> float:
    """Accuracy on the test rows, fitted to the labelled rows of the pool."""
    problem = pose(data, labelled)
    gram = problem.known @ problem.known.T
    gram[np.diag_indices_from(gram)] += strength
    # Cholesky takes a tenth of a decomposition's time.
    factor = torch.linalg.cholesky(torch.from_numpy(gram))
    dual = torch.cholesky_solve(torch.from_numpy(problem.targets), factor)
    return problem.accuracy(dual.numpy(), data.test, data.test_labels)


def probe(data: ProbeData, per_class: int, seeds: int = SEEDS) -> dict[str, object]:
    """Mean accuracy over draws of labelled rows, with its interval.

    Args:
        data: Pool and test.
        per_class: Labelled images a class.
        seeds: How many draws; `strength` is chosen on the first one's spare rows of the pool.
    """
    data = replace(data, test=data.test.astype(np.float64))
    strength = best_strength(data, *draw(data.pool_labels, per_class, 0))
    draws = [draw(data.pool_labels, per_class, seed)[0] for seed in range(seeds)]
    found = [held_out_accuracy(data, labelled, strength) for labelled in draws]
    return {
        **rounded(mean(found), trainings95(found, len(data.test_labels))),
        "per_class": per_class,
        "strength": strength,
        "by_seed": [round(value, 4) for value in found],
    }
