"""Which pictures the demo runs on: a training part for k-SAEs and Diff-C, a held-out part for Diff-C."""

from pathlib import Path

from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.data.registry import is_registered
from revelio.diffc.split import stratified_split

HELD_OUT = 0.2


def demo_images(
    source: str, root: Path | None, train_images: int, test_images: int, seed: int
) -> tuple[ImageDataset, ImageDataset | None]:
    """Open the demo's pictures.

    A known data set has its own train and test split. Of anything else a fifth of every class is held out,
    keyed by ``seed``. Where there are no labels nothing is held out: there is nothing to classify.

    Args:
        source: what :func:`revelio.data.open.open_dataset` takes.
        root: a local copy of a known data set.
        train_images: at most so many, spread evenly.
        test_images: at most so many held out.
        seed: of the held-out part.

    Raises:
        ValueError: the source is not there, empty or unreadable.
    """
    if is_registered(source):
        train = open_dataset(source, split="train", root=root)
        test = open_dataset(source, split="test", root=root)
        return train.spread(train_images), test.spread(test_images)
    whole = open_dataset(source, root=root)
    if whole.labels is None:
        return whole.spread(train_images), None
    kept, held = stratified_split(whole.labels, HELD_OUT, seed, "demo", "held out")
    if not held:
        return whole.spread(train_images), None
    return whole.subset(kept).spread(train_images), whole.subset(held).spread(test_images)
