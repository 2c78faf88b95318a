"""Linear probe: multinomial logistic regression on frozen activations.

How well a linear classifier reads the class off them (Alain and Bengio 2016). Rows are standardized by the
training rows; the strength of the L2 penalty is chosen on a validation part of the training rows, and the
probe is fitted again to all of them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from revelio.probes.chosen import Probed, choose_and_test

# Inverse strengths of the penalty, scikit-learn's C.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
ITERATIONS = 1000


def linear_probe(
    train: Float[np.ndarray, "n d"],
    train_labels: Int64[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int64[np.ndarray, " m"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    validation: float = 0.2,
    seed: int = 0,
) -> Probed:
    """Fit logistic regression to the training rows and test it.

    Args:
        train: activations, a row an image.
        train_labels: their classes.
        test: activations of other images.
        test_labels: their classes.
        strengths: inverse penalties to choose from; of equally good ones the first.
        validation: the share of each class's training rows to choose on.
        seed: of that part.

    Raises:
        ValueError: a class has only one training row.
    """

    def fitted(rows: np.ndarray, labels: np.ndarray, strength: float) -> Pipeline:
        regression = LogisticRegression(C=strength, max_iter=ITERATIONS)
        return make_pipeline(StandardScaler(), regression).fit(rows, labels)

    return choose_and_test(
        fitted, strengths, train, train_labels, test, test_labels, validation, seed
    )
