"""What every probe reports: accuracy with its 95 % interval, and seconds an image."""

from collections.abc import Sequence
from dataclasses import dataclass

from revelio.stats import wilson95
from revelio.wording import plural


@dataclass(frozen=True)
class Score:
    """An accuracy on test images.

    Attributes:
        value: the share that was right.
        low: of Wilson's 95 % interval.
        high: of the same.
        images: how many were tested.
        seconds: an image, of what the probe does itself; activations that it was given are not counted.
    """

    value: float
    low: float
    high: float
    images: int
    seconds: float


def score(predicted: Sequence[int], labels: Sequence[int], seconds: float) -> Score:
    """The accuracy of predicted classes.

    Args:
        predicted: a class an image.
        labels: the true ones.
        seconds: of all images together.

    Raises:
        ValueError: there are no images, or not as many labels.
    """
    if not len(labels) or len(predicted) != len(labels):
        raise ValueError(
            f"{plural(len(predicted), 'prediction')} and {plural(len(labels), 'label')}: no accuracy"
        )
    right = sum(int(one) == int(other) for one, other in zip(predicted, labels, strict=True))
    low, high = wilson95(right, len(labels))
    return Score(right / len(labels), low, high, len(labels), seconds / len(labels))
