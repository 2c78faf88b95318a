"""Which pictures the demo runs on: a training part for k-SAEs and Diff-C, a held-out part for Diff-C."""

from dataclasses import replace

from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.data.registry import is_registered
from revelio.data.splits import stratified_split
from revelio.pipelines.demo.config import DemoConfig

HELD_OUT = 0.2


def demo_images(config: DemoConfig) -> tuple[ImageDataset, ImageDataset | None]:
    """Open the demo's pictures: for training, and held out.

    A known data set has its own train and test split. Of anything else a fifth of every class is held out,
    keyed by the seed. Where there are no labels nothing is held out: there is nothing to classify.

    Raises:
        ValueError: the source is not there, empty or unreadable.
    """
    data = config.data
    if is_registered(data.source) and data.split is None:
        train, test = (open_dataset(replace(data, split=split)) for split in ("train", "test"))
        return train.spread(config.train_images), test.spread(config.test_images)
    whole = open_dataset(data)
    if whole.labels is None:
        return whole.spread(config.train_images), None
    kept, held = stratified_split(whole.labels, HELD_OUT, config.seed, "demo", "held out")
    if not held:
        return whole.spread(config.train_images), None
    train, test = whole.subset(kept), whole.subset(held)
    return train.spread(config.train_images), test.spread(config.test_images)
