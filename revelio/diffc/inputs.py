"""From data sets, backbones and stores to the grid sources of train and test.

``made`` is how grids are made, as plain values (:meth:`revelio.diffc.config.GridsConfig.made`). It is saved
with the classifier, so that testing it later makes the same grids without being told.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from revelio.activations.store import WHOLE_GRIDS, ActivationStore
from revelio.backbones.base import Backbone
from revelio.data.config import DataConfig
from revelio.data.dataset import ImageDataset, ImageError
from revelio.data.open import open_dataset
from revelio.data.splits import stratified_split
from revelio.device_memory import not_one_fits, release
from revelio.diffc.config import GridsConfig
from revelio.diffc.pixels import PixelsBackbone
from revelio.diffc.sources import LiveGrids, TensorGrids, stored_grids
from revelio.trust import printable

# What stores that one classifier takes must agree in.
STORE_KEYS = ("backbone", "layer", "timestep", "prompts", "pool")


def open_backbone(config: GridsConfig, *, imports: bool = False) -> Backbone:
    """Load the backbone, cut after the layer.

    Args:
        config: how the grids are made.
        imports: whether a backbone named ``module:function`` may be imported; only where the user named it,
            not the config of a saved classifier.

    Raises:
        KeyError: an unknown backbone or layer.
        ValueError: the settings don't fit the backbone.
    """
    if config.backbone.name == PixelsBackbone.name:
        if config.random_weights is not None:
            raise ValueError("pixels have no weights: leave random_weights out")
        size = config.backbone.image_size
        return PixelsBackbone() if size is None else PixelsBackbone(size)
    from revelio.backbones.registry import load_backbone

    backbone = load_backbone(config.backbone, layers=[config.layer], imports=imports)
    if config.random_weights is None:
        return backbone
    from revelio.backbones.random_init import untrained

    return untrained(backbone, config.random_weights)


def live_grids(
    dataset: ImageDataset, backbone: Backbone, config: GridsConfig, workers: int = 0
) -> LiveGrids:
    """The grids of a data set, made as the config says.

    Raises:
        KeyError: the backbone doesn't have the layer.
        ValueError: no labels, no images, a wrong timestep, prompts for a backbone without text, or a device
            whose memory does not hold one image beside the backbone.
    """
    prompts = None  # for the policy `empty`, which backbones without text know too
    if config.prompts != "empty":
        from revelio.backbones.prompts import prompt_texts

        device = config.backbone.device
        prompts = prompt_texts(config.prompts, dataset, device=device, clip=config.clip)
    try:
        return LiveGrids(
            dataset,
            backbone,
            config.layer,
            timestep=config.timestep,
            prompts=prompts,
            seed=config.seed,
            workers=workers,
        )
    except torch.OutOfMemoryError as error:  # its first pass tells the grids' shape
        release(error)
        raise not_one_fits(0) from error


def portable(name: str) -> str:
    """A model's name as written files keep it: of an absolute path only the last part."""
    return Path(name).name if Path(name).is_absolute() else name


def open_stores(paths: Sequence[Path], memory_gb: float) -> tuple[TensorGrids, dict[str, Any]]:
    """Stored grids, and how they were made.

    Raises:
        ValueError: a store is missing, cut, unlabelled, or of other images than the first.
    """
    stores = [ActivationStore.open(path, instead=WHOLE_GRIDS) for path in paths]
    made = _made_of(stores[0].manifest)
    return stored_grids(stores, memory_gb), made | {"classes": list(stores[0].classes)}


def _made_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """How a store's rows were made, in the words of this module."""
    size = manifest.get("image_size")
    return {
        "backbone": manifest.get("model"),
        "revision": manifest.get("revision"),
        "image_size": size[0] if isinstance(size, list) else size,  # [h, w] of a square
        "dtype": manifest.get("compute_dtype"),
        "attention": manifest.get("attention"),
        "layer": manifest["layer"],
        "timestep": manifest.get("timestep"),
        "prompts": manifest.get("prompt_policy") or "empty",
        "seed": manifest.get("seed") or 0,
        "pool": manifest.get("pool", "none"),
        "dataset": manifest.get("dataset"),
    }


def can_be_made_again(made: dict[str, Any]) -> bool:
    """Whether a backbone can make these grids of new images: they were neither pooled nor anonymous."""
    named = made.get("backbone") is not None and made.get("layer") is not None
    return named and made.get("pool", "none") == "none"


def check_made(train: dict[str, Any], test: dict[str, Any]) -> None:
    """Refuse stores of train and test that were made differently.

    Raises:
        ValueError: their backbone, layer, timestep, prompts or classes differ.
    """
    for key in (*STORE_KEYS, "classes"):
        if train.get(key) != test.get(key):
            raise ValueError(
                f"the {key} of the train and the test store differ ({train.get(key)} and "
                f"{test.get(key)}): take stores of one extraction"
            )


def open_images(config: DataConfig) -> tuple[ImageDataset, list[str]]:
    """The data set; where unreadable images are to be skipped without them, and one line on each."""
    dataset = open_dataset(config)
    return readable(dataset) if config.on_error == "skip" else (dataset, [])


def readable(dataset: ImageDataset) -> tuple[ImageDataset, list[str]]:
    """The images that can be read, and one line on each that can't."""
    kept, skipped = [], []
    for index in range(len(dataset)):
        try:
            dataset.read(index)
        except ImageError as error:
            skipped.append(str(error))
        else:
            kept.append(index)
    return (dataset.subset(kept) if skipped else dataset), skipped


def cut_test(
    dataset: ImageDataset, fraction: float, seed: int
) -> tuple[ImageDataset, ImageDataset]:
    """Cut a share of every class off as the test set, fixed by ``seed``.

    Raises:
        ValueError: the images have no labels, or nothing would be left to test on.
    """
    kept, held = stratified_split(labels_of(dataset), fraction, seed, "diffc test")
    if not held and not fraction:
        raise ValueError("a share of 0 leaves no test images: give a share above it")
    if not held:
        # Whatever the share, a class of two images gives one, and a class of one keeps it.
        raise ValueError(
            f"{printable(dataset.name)} has one image a class, so none is left to test on: give classes of "
            "two or more"
        )
    return dataset.subset(kept), dataset.subset(held)


def labels_of(dataset: ImageDataset) -> Sequence[int]:
    """The labels.

    Raises:
        ValueError: there are none.
    """
    if dataset.labels is None:
        raise ValueError(
            f"{dataset.name} has no labels, which a classifier needs: give class folders or the column "
            "that holds them (data.label_column)"
        )
    return dataset.labels


def check_classes(train: ImageDataset, test: ImageDataset) -> tuple[str, ...]:
    """The class names, which both sets must have in the same order.

    Raises:
        ValueError: they differ.
    """
    for dataset in (train, test):
        labels_of(dataset)
    if train.classes != test.classes:
        only = set(train.classes) ^ set(test.classes)
        shown = ", ".join(sorted(only)[:5]) or "the same names in another order"
        raise ValueError(f"train and test have different classes ({shown}): name splits of one set")
    return train.classes
