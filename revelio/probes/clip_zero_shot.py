"""CLIP zero-shot: the class whose prompts lie nearest to the image (Radford et al. 2021, Sec. 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from revelio.backbones.prompts import CLIP, ZeroShot, class_texts
from revelio.data.dataset import ImageDataset
from revelio.probes.score import Score, score


@dataclass(frozen=True)
class ZeroShotResult:
    """What CLIP sees.

    Attributes:
        score: accuracy; its seconds count reading the pictures, too.
        predicted: a class an image.
    """

    score: Score
    predicted: list[int]


def clip_zero_shot(
    dataset: ImageDataset,
    *,
    clip: str = CLIP,
    templates: Sequence[str] = (),
    device: str = "auto",
    batch_size: int = 64,
) -> ZeroShotResult:
    """Classify a labelled data set by the names of its classes.

    Args:
        dataset: the images.
        clip: a known name, a folder or a hub id of a CLIP.
        templates: prompts with ``{}`` for the class name; of several the mean of the embeddings is taken.
            None at all is the data set's own prompt.
        device: where CLIP runs.
        batch_size: images at once.

    Raises:
        ValueError: there are no labels or class names, or a template has no place for the class name.
        ImageError: an image can't be read.
    """
    if dataset.labels is None or not dataset.classes:
        raise ValueError(
            f"{dataset.name} has no labels: an accuracy needs class folders or a labelled set"
        )
    texts = [class_texts(dataset, template) for template in templates or (None,)]
    zero_shot = ZeroShot(clip, list(zip(*texts, strict=True)), device)
    predicted = [0] * len(dataset)
    start = perf_counter()
    for indices, labels in zero_shot.classify_all(dataset, batch_size):
        for index, label in zip(indices, labels, strict=True):
            predicted[index] = label
    return ZeroShotResult(score(predicted, dataset.labels, perf_counter() - start), predicted)
