"""What is measured of one layer's rows: classes by two probes, purity of channels; without labels, the rank.

linear   ridge classifier on standardized rows, tested on each of five parts in turn (of as many as the
         least class has images); its penalty is chosen on the others by leave-one-out, in closed form
knn      class of most of the five nearest other images, by cosine (leave-one-out)
purity   share of same-class pairs among the ten images that activate a channel most, mean over channels
rank     exp(entropy of the singular values' shares), of centered rows: RankMe (Garrido et al. 2023, Eq. 1),
         which goes with the accuracy of probes among layers of like width. It knows nothing of classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from revelio.advisor.config import FIRST_OF_CLASS, FOLDS
from revelio.analysis.label_measures import class_counts, measures
from revelio.seeds import key_seed

NEIGHBORS = 5
TOP = 10
PENALTIES = (1e0, 1e1, 1e2, 1e3, 1e4)


@dataclass(frozen=True)
class Measured:
    """One candidate on some images.

    Attributes:
        right: by probe, whether each image's class was found; empty without labels.
        numbers: ``purity`` with labels, ``rank`` always.
    """

    right: dict[str, Bool[np.ndarray, " n"]]
    numbers: dict[str, float]

    def value(self, name: str) -> float:
        """An accuracy, or another number."""
        return float(self.right[name].mean()) if name in self.right else self.numbers[name]


def measure(
    rows: Float[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"] | None, seed: int
) -> Measured:
    """Measure rows of images, with labels or without.

    Raises:
        ValueError: with labels, a class has one image.
    """
    numbers = {"rank": effective_rank(rows)}
    if labels is None:
        return Measured({}, numbers)
    right = {"linear": right_by_linear(rows, labels, seed), "knn": right_by_neighbors(rows, labels)}
    return Measured(right, numbers | {"purity": channel_purity(rows, labels)})


def right_by_linear(
    rows: Float[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"], seed: int
) -> Bool[np.ndarray, " n"]:
    """Which images a linear probe gets right that was trained on the other parts."""
    found = np.empty_like(labels)
    _, sizes = np.unique(labels, return_counts=True)
    folds = min(FOLDS, int(sizes.min()))
    parts = StratifiedKFold(folds, shuffle=True, random_state=key_seed(seed, "folds") % 2**32)
    for known, held in parts.split(rows, labels):
        probe = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
        found[held] = probe.fit(rows[known], labels[known]).predict(rows[held])
    return found == labels


def right_by_neighbors(
    rows: Float[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which images most of their nearest others agree with; of equally many, the smallest class id."""
    units = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    near = units @ units.T
    np.fill_diagonal(near, -np.inf)
    nearest = np.argsort(-near, axis=1, kind="stable")[:, :NEIGHBORS]
    votes = class_counts(torch.from_numpy(labels[nearest]), int(labels.max()) + 1)
    return votes.argmax(1).numpy() == labels


def channel_purity(rows: Float[np.ndarray, "n d"], labels: Int64[np.ndarray, " n"]) -> float:
    """How alike the labels of the images are that activate a channel most, mean over the channels."""
    top = np.argsort(-rows, axis=0, kind="stable")[: min(TOP, len(rows))].T
    counts = class_counts(torch.from_numpy(labels[top]), int(labels.max()) + 1)
    return float(measures(counts)["pairs"].mean())


def effective_rank(rows: Float[np.ndarray, "n d"]) -> float:
    """Over how many directions the rows are spread, 1 to min(n, d)."""
    values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    shares = values / max(float(values.sum()), 1e-12)
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-12))).sum()))


def nested_order(labels: Sequence[int] | None, count: int, seed: int) -> list[int]:
    """Images in an order whose every beginning, from three of each class on, can be measured.

    Args:
        labels: a class an image, or None.
        count: how many images.
        seed: of the order.
    """
    draw = np.random.default_rng(key_seed(seed, "order of images"))
    order = draw.permutation(count).tolist()
    if labels is None:
        return order
    taken: dict[int, int] = {}
    first, rest = [], []
    for index in order:
        label = int(labels[index])
        taken[label] = taken.get(label, 0) + 1
        (first if taken[label] <= FIRST_OF_CLASS else rest).append(index)
    return first + rest
