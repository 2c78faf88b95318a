"""A probe whose one setting is chosen on a validation part of the training rows, then tested once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int64

from revelio.probes.score import Score, score
from revelio.probes.split import validation_part

S = TypeVar("S", int, float)


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        score: on the test rows.
        predicted: a class a test row.
        setting: what was chosen on the validation part.
        by_setting: accuracy on the validation part.
    """

    score: Score
    predicted: list[int]
    setting: float
    by_setting: dict[float, float]


def choose_and_test(
    fitted: Callable[[np.ndarray, np.ndarray, S], Any],
    settings: Sequence[S],
    train: Float[np.ndarray, "n d"],
    train_labels: Int64[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int64[np.ndarray, " m"],
    validation: float,
    seed: int,
) -> Probed:
    """Try the settings on a validation part, fit the best to all training rows, and test it.

    Args:
        fitted: rows, labels, setting -> something with ``predict(rows)``, as scikit-learn's.
        settings: to choose from; of equally good ones the first.
        train: a row an image.
        train_labels: their classes.
        test: rows of other images.
        test_labels: their classes.
        validation: the share of each class's training rows to choose on.
        seed: of that part.

    Raises:
        ValueError: a class has only one training row.
    """
    known, held = validation_part(train_labels, validation, seed)
    by_setting: dict[float, float] = {}
    for setting in settings:
        model = fitted(train[known], train_labels[known], setting)
        by_setting[setting] = float((model.predict(train[held]) == train_labels[held]).mean())
    best = max(settings, key=lambda setting: by_setting[setting])
    model = fitted(train, train_labels, best)
    start = perf_counter()
    predicted = model.predict(test).tolist()
    found = score(predicted, test_labels.tolist(), perf_counter() - start)
    return Probed(found, predicted, best, by_setting)
