"""k nearest neighbors on frozen activations, by cosine: a probe without training."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64
from sklearn.neighbors import KNeighborsClassifier

from revelio.probes.chosen import Probed, choose_and_test

NEIGHBORS = (1, 5, 10, 20)


def knn_probe(
    train: Float[np.ndarray, "n d"],
    train_labels: Int64[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int64[np.ndarray, " m"],
    *,
    neighbors: Sequence[int] = NEIGHBORS,
    validation: float = 0.2,
    seed: int = 0,
) -> Probed:
    """The class of most of the k nearest training rows; of equally many the smallest class id.

    Args:
        train: activations, a row an image.
        train_labels: their classes.
        test: activations of other images.
        test_labels: their classes.
        neighbors: k to choose from on a validation part of the training rows; of equally good ones the first.
            Where there are fewer rows, all of them are the neighbors.
        validation: the share of each class's training rows to choose on.
        seed: of that part.

    Raises:
        ValueError: a class has only one training row.
    """

    def fitted(rows: np.ndarray, labels: np.ndarray, k: int) -> KNeighborsClassifier:
        nearest = KNeighborsClassifier(min(k, len(rows)), metric="cosine", algorithm="brute")
        return nearest.fit(rows, labels)

    return choose_and_test(
        fitted, neighbors, train, train_labels, test, test_labels, validation, seed
    )
