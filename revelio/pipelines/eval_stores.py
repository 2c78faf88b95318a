"""The activations that an evaluation is of: opened, and refused where they do not belong together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.activations.store import ActivationStore
from revelio.analysis.config import OverCells
from revelio.analysis.top_images import check_fits, pooled
from revelio.evaluation.config import EvalSAEConfig
from revelio.sae.inputs import find, trained_stores
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import printable
from revelio.wording import plural

TOO_FEW = 100
# Relative distance of activations of one picture, which rounding keeps it below.
SAME = 1e-2
OWN_STORE = "the images are those that the k-SAE was trained on"
UNLABELLED = "the images have no labels: only label-free measures were taken"
NO_TRAIN_STORE = (
    "no training store was given: controls are made of the held-out activations themselves"
)


@dataclass(frozen=True)
class EvalData:
    """What the k-SAEs of an evaluation share.

    Attributes:
        store: of the held-out images.
        rows: its activations, or those of all cells of each image.
        source: the activations that controls are made of, a row each.
        source_sha256: of their store.
        source_about: its manifest.
        random: activations of a backbone with random weights, of the held-out images and to train on; None:
            not wanted.
        notes: what is to be said of them.
        dictionaries: by d, n, k and normalization the control dictionaries, and what was measured of
            them: on the activations, and in the model.
    """

    store: ActivationStore
    rows: Float[Tensor, "images d"] | Float[Tensor, "images c d"]
    source: Float[Tensor, "others d"]
    source_sha256: str
    source_about: Mapping[str, Any]
    random: tuple[Tensor, Tensor] | None
    notes: list[str]
    dictionaries: dict[tuple[Any, ...], Any] = field(default_factory=dict)


def opened_for(path: Path, over: OverCells | None) -> ActivationStore:
    """A store of whole images or, where codes are of cells, of cells."""
    return ActivationStore.open(path, cells=over != "pooled")


def _rows(store: ActivationStore, over: OverCells | None) -> Tensor:
    if over == "pooled":
        return torch.cat([pooled(batch) for _, batch in store.batches(1024)])
    starts = range(0, store.images, 64)
    return torch.cat([store.image_cells(at, min(at + 64, store.images)) for at in starts])


def eval_data(config: EvalSAEConfig, models: Mapping[str, KSparseAutoencoder]) -> EvalData:
    """Open the stores, and refuse now what would fail after the work.

    Raises:
        ValueError: stores and k-SAEs do not fit together, images are in both, or too few.
    """
    store, over = opened_for(config.store, config.over), config.over
    if store.images < TOO_FEW:
        raise ValueError(
            f"{config.store} holds {plural(store.images, 'image')}: measures need {TOO_FEW} up"
        )
    train = opened_for(config.train_store, over) if config.train_store else store
    for each in (store, train):
        _check_channels(each, store)
        for model in models.values():
            check_fits(model, each)
            find(model.inputs, each.manifest)
    rows = _rows(store, over)
    notes = [] if store.labels is not None else [UNLABELLED]
    random = _random(config, store)
    if config.train_store is None:
        own = any(
            one.get("sha256") == store.sha256
            for model in models.values()
            for one in trained_stores(model.trained_on)
        )
        if own and config.overlap == "stop":
            raise ValueError(
                f"{config.store} is what the k-SAE was trained on: hold out other images, or set overlap to "
                "allow"
            )
        notes = [*([OWN_STORE] if own else []), NO_TRAIN_STORE, *notes]
        return EvalData(
            store, rows, rows.flatten(0, -2), store.sha256, store.manifest, random, notes
        )
    train_rows = _rows(train, over)
    shared = shared_images(train, train_rows, store, rows)
    if shared and config.overlap == "stop":
        raise ValueError(
            f"{shared:,} of the {plural(store.images, 'image')} of {config.store} are in "
            f"{config.train_store} too: hold out other images, or set overlap to allow"
        )
    if shared:
        notes = [f"{shared:,} of {store.images:,} images are training images", *notes]
    source = train_rows.flatten(0, -2)
    return EvalData(store, rows, source, train.sha256, train.manifest, random, notes)


def shared_images(
    train: ActivationStore, train_rows: Tensor, store: ActivationStore, rows: Tensor
) -> int:
    """How many images of ``store`` are in ``train`` too.

    Of one data set ids say it. Others may hold the same pictures, and different ones of the same name: there
    the activations of equal ids are compared, up to the rounding of another batch.
    """
    place = {name: number for number, name in enumerate(train.ids)}
    both = [number for number, name in enumerate(store.ids) if name in place]
    keys = ("dataset", "split")
    if all(train.manifest.get(key) == store.manifest.get(key) for key in keys) or not both:
        return len(both)
    ours, theirs = rows[both].flatten(1), train_rows[[place[store.ids[n]] for n in both]].flatten(1)
    if ours.shape != theirs.shape:
        return 0
    apart = (ours - theirs).norm(dim=1) / ours.norm(dim=1).clamp(min=1e-12)
    return int((apart < SAME).sum())


def _check_channels(other: ActivationStore, store: ActivationStore) -> None:
    if other.row_shape[0] != store.row_shape[0]:
        raise ValueError(
            f"{other.path} has {plural(other.row_shape[0], 'channel')}, {store.path} {store.row_shape[0]}: "
            "give stores of one layer"
        )


def _random(config: EvalSAEConfig, store: ActivationStore) -> tuple[Tensor, Tensor] | None:
    """The random weights' activations of the held-out images, in their order, and those to train on.

    Raises:
        ValueError: one of the two stores is missing, or they are of another layer, noise or other images.
    """
    if config.random_store is None and config.random_train_store is None:
        return None
    if config.random_store is None or config.random_train_store is None:
        raise ValueError(
            "random_store and random_train_store belong together: the images of store, and those to train on"
        )
    over, places = config.over, (config.random_store, config.random_train_store)
    held, train = (opened_for(path, over) for path in places)
    for other in (held, train):
        _check_channels(other, store)
        for key in ("layer", "timestep", "prompt_policy"):
            if other.manifest.get(key) != store.manifest.get(key):
                raise ValueError(
                    f"the {key} of {other.path} and of {store.path} differ ({other.manifest.get(key)} and "
                    f"{store.manifest.get(key)}): extract both alike"
                )
    if held.manifest.get("model") == store.manifest.get("model"):
        raise ValueError(
            f"{held.path} and {store.path} are of the same model, {printable(held.manifest.get('model'))}: "
            "extract the first with random_weights"
        )
    place = {name: row for row, name in enumerate(held.ids)}
    missing = [name for name in store.ids if name not in place]
    if missing:
        raise ValueError(
            f"{len(missing):,} of the {plural(store.images, 'image')} of {store.path} are not in "
            f"{held.path}: extract the same images"
        )
    return _rows(held, over)[[place[name] for name in store.ids]], _rows(train, over).flatten(0, -2)
