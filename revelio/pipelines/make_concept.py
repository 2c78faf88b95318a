"""A concept from whatever says it: texts, stores of pictures, latents, other concepts."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.activations.store import ActivationStore
from revelio.analysis.top_images import pooled
from revelio.outputs import check_replaceable, claimed, replace_files
from revelio.pipelines.inputs import check_alike, check_same_source
from revelio.pipelines.steer_parts import (
    check_trained_on,
    open_ksae,
    open_pipeline,
    parse_latents,
    reading_of,
)
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import (
    CARD,
    TENSORS,
    Concept,
    all_codes,
    combined,
    from_latents,
    from_rows,
    from_texts,
)
from revelio.steering.config import ConceptConfig
from revelio.steering.edits import Read
from revelio.steering.find import Found, find_latents, prompt_codes
from revelio.steering.prompts import read_prompts
from revelio.trust import printable

MAKER = "concept"
CODED_AT_ONCE = 4096  # rows
OF_CELLS = "give a k-SAE of cells (ksae), or extract the images without `cells`"


def make_concept(config: ConceptConfig) -> Concept:
    """Make a concept as a config says, and save it.

    Raises:
        KeyError: an unknown model or layer.
        ValueError: it is said in no way or in several, the parts don't fit, or another concept stands at
            ``config.out``; nothing is written.
    """
    check_replaceable(config.out, MAKER, (TENSORS, CARD))
    ways = {
        "texts": bool(config.texts or config.texts_file),
        "store": config.store is not None,
        "latent_values": bool(config.latent_values),
        "concepts": bool(config.concepts),
    }
    chosen = [way for way, said in ways.items() if said]
    if len(chosen) != 1:
        raise ValueError(
            f"a concept of {' and '.join(chosen) or 'nothing'}: give one of {', '.join(ways)}"
        )
    if chosen[0] not in ("concepts", "store") and config.layer is None:
        raise ValueError("which layer? give layer, such as text_encoder.block9")
    if config.find and config.ksae is None:
        raise ValueError("latents are found of a k-SAE: give ksae")
    makers = {
        "texts": _of_texts,
        "store": _of_stores,
        "latent_values": _of_latents,
        "concepts": _of_concepts,
    }
    with claimed(config.out):
        made = replace(makers[chosen[0]](config), strengths=config.strength_range)
        check_same_source(config.out / CARD, _as_text, _as_text(made.card()))
        replace_files(config.out, MAKER, made.save)
    return made


def _as_text(card: Mapping[str, Any]) -> str:
    return json.dumps(card, sort_keys=True)


def _of_texts(config: ConceptConfig) -> Concept:
    texts, against = list(config.texts), list(config.against)
    if config.texts_file is not None:
        texts += [one.text for one in read_prompts(str(config.texts_file))]
    if config.against_file is not None:
        against += [one.text for one in read_prompts(str(config.against_file))]
    layers = open_pipeline(config.backbone)
    ksae = None if config.ksae is None else open_ksae(config.ksae, layers.denoiser.device)
    assert config.layer is not None
    if ksae is not None:
        check_trained_on(ksae, str(config.ksae), layers.name, config.layer)
    if not config.find:
        return from_texts(
            layers, config.layer, ksae, texts, against,
            codes=config.codes, positions=config.positions,
        )  # fmt: skip
    assert ksae is not None
    sets = [prompt_codes(layers, config.layer, ksae, part) for part in (texts, against)]
    found = _found(config, *sets)
    made = {"texts": texts, "against": against}
    return _of_found(layers.name, config.layer, ksae, found, made)


def _of_stores(config: ConceptConfig) -> Concept:
    assert config.store is not None
    ksae = None if config.ksae is None else open_ksae(config.ksae)
    read = "pooled" if ksae is None else reading_of(ksae)
    store = ActivationStore.open(config.store, cells=read == "cells", instead=OF_CELLS)
    layer = str(store.manifest["layer"])
    if config.layer not in (None, layer):
        raise ValueError(
            f"{store.path} holds pictures' activations of layer {printable(layer)}, not of {config.layer}: "
            "concepts of a text layer are made of texts"
        )
    model = str(store.manifest.get("model") or config.backbone.name)
    if ksae is not None:
        check_trained_on(ksae, str(config.ksae), store.manifest.get("model"), layer)
    rows, against = _rows_of(config, store, read, only=_of_cells(ksae))
    made = {"store": config.store.resolve().name, "class": config.class_name}
    if not config.find:
        both = (rows.flatten(0, 1), against.flatten(0, 1))
        return from_rows(model, layer, ksae, *both, codes=config.codes, made=made)
    assert ksae is not None
    found = _found(config, *(_image_codes(ksae, part) for part in (rows, against)))
    return _of_found(model, layer, ksae, found, made)


def _of_cells(ksae: KSparseAutoencoder | None) -> bool:
    """Whether a k-SAE says that it was trained on cells; without a word it may be of either."""
    return ksae is not None and ksae.trained_on.get("rows_are") == "cells"


def _read(store: ActivationStore, read: Read, only: bool) -> Float[Tensor, "b r d"]:
    """What a k-SAE reads of each image: r cells, or the mean of all.

    Raises:
        ValueError: cells alone are read, and the store holds none.
    """
    rows = store.tensor()
    if read == "pooled":
        return pooled(rows)[:, None]
    if rows.ndim == 4:
        return rows.float().flatten(2).mT
    if store.cells is None and only:
        raise ValueError(
            f"{store.path} holds one vector an image, and the k-SAE is of cells: extract whole grids (pool "
            "none), or cells"
        )
    return rows.float().unflatten(0, (-1, store.cells or 1))


def _rows_of(
    config: ConceptConfig, store: ActivationStore, read: Read, *, only: bool
) -> tuple[Float[Tensor, "a r d"], Float[Tensor, "b r d"]]:
    """What is read of the pictures of the concept, and of the others.

    Raises:
        ValueError: the stores don't say which are which, can't be compared, are of prompts, or hold no cells
            where a k-SAE reads such.
    """
    if "prompts" in store.manifest:
        raise ValueError(
            f"{store.path} holds tokens of prompts: give texts and a layer, or a store of pictures"
        )
    rows = _read(store, read, only)
    if config.class_name is None:
        if config.against_store is None:
            raise ValueError("which pictures are the concept's? give class_name or against_store")
        against = ActivationStore.open(
            config.against_store, cells=read == "cells", instead=OF_CELLS
        )
        check_alike(store, against)
        return rows, _read(against, read, only)
    if store.labels is None or config.class_name not in store.classes:
        known = printable(", ".join(store.classes)) or "none"
        raise ValueError(f"{store.path} has no class {config.class_name!r}: it has {known}")
    inside = store.labels == store.classes.index(config.class_name)
    return rows[inside], rows[~inside]


@torch.no_grad()
def _image_codes(ksae: KSparseAutoencoder, rows: Float[Tensor, "b r d"]) -> Float[Tensor, "b n"]:
    """The mean code of each latent over what is read of an image, as of a prompt's positions."""
    parts = rows.split(max(1, CODED_AT_ONCE // rows.shape[1]))
    codes = (all_codes(ksae, part.flatten(0, 1), "sparse") for part in parts)
    means = [found.unflatten(0, (-1, rows.shape[1])).mean(1) for found in codes]
    return torch.cat(means)


def _of_latents(config: ConceptConfig) -> Concept:
    if config.ksae is None:
        raise ValueError("latents are a k-SAE's: give ksae")
    assert config.layer is not None
    ksae = open_ksae(config.ksae)
    check_trained_on(ksae, config.ksae, None, config.layer)
    model = str(ksae.trained_on.get("model") or config.backbone.name)
    return from_latents(model, config.layer, ksae, parse_latents(config.latent_values, 1.0))


def _of_concepts(config: ConceptConfig) -> Concept:
    return combined([Concept.load(folder) for folder in config.concepts], config.weights or None)


def _found(config: ConceptConfig, inside: Tensor, outside: Tensor) -> Found:
    return find_latents(
        inside, outside, count=config.find, specificity=config.specificity, seed=config.seed
    )


def _of_found(
    model: str, layer: str, ksae: KSparseAutoencoder, found: Found, made: Mapping[str, object]
) -> Concept:
    weights = dict(zip(found.latents, found.weights, strict=True))
    with torch.no_grad():
        return from_latents(model, layer, ksae, weights, made={**made, "found": found.as_dict()})
