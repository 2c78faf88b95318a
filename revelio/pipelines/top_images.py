"""The top images of every latent of a k-SAE over a store, made and written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.activations.store import ActivationStore
from revelio.analysis.config import MakeTopImagesConfig
from revelio.analysis.top_images import TopImages, over_cells, top_images
from revelio.analysis.top_images_files import (
    DESCRIPTION,
    MAKER,
    OLDER,
    TENSORS,
    check_ksae,
    check_store,
    load_top_images,
    save_top_images,
    sources,
    with_source,
)
from revelio.bounds import check_fields
from revelio.outputs import check_replaceable, claimed
from revelio.pipelines import Report, counted, silent
from revelio.pipelines.inputs import check_same_source, made_from, open_sae, place_of
from revelio.sae.model import KSparseAutoencoder

__all__ = ["MadeTopImages", "MakeTopImagesConfig", "compute", "make_top_images", "read_top_images"]


@dataclass(frozen=True)
class MadeTopImages:
    """Top images, and the folder that holds them."""

    path: Path
    top: TopImages


def make_top_images(config: MakeTopImagesConfig, progress: Report = silent) -> MadeTopImages:
    """Find the top images of every latent, and write them.

    Args:
        config: which store and k-SAE, how many images, and where to write.
        progress: told how many images are done.

    Raises:
        ValueError: a setting is outside its bounds, store and k-SAE do not fit together, or the folder holds
            something else: also the top images of another store or k-SAE, or of other settings.
    """
    check_fields(config)
    out = config.out or place_of(config.ksae, "top-images")
    check_replaceable(out, MAKER, (TENSORS, DESCRIPTION), OLDER)
    with claimed(out):
        model = open_sae(config.ksae, config.device, progress)
        over = over_cells(model, config)
        store = ActivationStore.open(config.store, cells=over != "pooled")
        how = {"codes": config.kind} | ({} if over == "pooled" else {"cells": over})
        ours = _made_as({"source": sources(model, store) | how, "m": config.kept})
        check_same_source(out / DESCRIPTION, _made_as, ours)
        top = compute(config, store, model, progress)
        save_top_images(top, out)
    return MadeTopImages(out, top)


def _made_as(description: dict[str, Any]) -> Any:
    """What top images were made from, and how, to be compared; None: they do not say."""
    source, pair = description["source"], made_from(description["source"])
    how = [source.get(name) for name in ("codes", "cells")]
    return None if pair is None else [*pair, description["m"], *how]


def compute(
    config: MakeTopImagesConfig, store: ActivationStore, model: KSparseAutoencoder, progress: Report
) -> TopImages:
    """The top images as the config asks, with what they were made from."""
    told = counted(progress, "top images", store.images, "image")
    device = next(model.parameters()).device
    return with_source(top_images(model, store, config, device=device, progress=told), model, store)


def read_top_images(path: Path, store: ActivationStore, model: KSparseAutoencoder) -> TopImages:
    """Top images out of a folder.

    Raises:
        ValueError: they are of another store or k-SAE.
    """
    top = load_top_images(path)
    check_store(top, store)
    check_ksae(top, model)
    return top
