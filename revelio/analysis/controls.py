"""Controls for a k-SAE's purity: what control dictionaries reach on the same images.

Purity asks how alike the labels of a latent's top images are. A backbone's activations alone make it high,
so it says little without a control (for language models: "Sanity Checks for Sparse Autoencoders",
arXiv:2602.14111). A control dictionary is an autoencoder whose directions no training of an autoencoder
found: they are drawn, or taken from the activations. It has the width, the number of latents and the k of
the k-SAE that it stands beside, or fewer latents where there are no more directions, and normalizes
activations as that does:

    random directions   drawn on the unit sphere
    data rows           centered activations of random images of the store, at unit length
    channels            each channel of the activations, with either sign
    principal axes      the principal components of the store, with either sign

Intervals are of the *difference* between the k-SAE and a control, over images that both were judged on
(:mod:`revelio.analysis.paired`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.analysis.config import PurityConfig, TopImagesConfig
from revelio.analysis.label_measures import mean_measures
from revelio.analysis.paired import Measured, against, halves, interval, method, shuffles, within
from revelio.analysis.purity import eligible
from revelio.analysis.top_images import TopImages, over_cells, pooled, top_images
from revelio.sae.inputs import Source
from revelio.seeds import generator

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

# How many controls there are.
CONTROLS = 4
# A latent's images are kept this many times over, so that others move up in a part of the images.
SPARE = 3
# Which way is better, by the measure's name.
BETTER = {"sigma": -1, "majority": 1, "entropy": -1, "pairs": 1}
# What no value of a measure is above; none is below 0.
HIGHEST = {"sigma": math.inf, "majority": 1, "entropy": 1, "pairs": 1}


@dataclass(frozen=True)
class Judged:
    """A model's purity on a store, as a whole and on subsets of the images.

    Attributes:
        latents: how many latents the means are over.
        measures: the mean of each measure.
    """

    latents: int
    measures: dict[str, Measured]


def control_models(
    model: "KSparseAutoencoder",
    rows: Float[Tensor, "images d"],
    seed: int = 0,
    source: Source = None,
) -> dict[str, "KSparseAutoencoder"]:
    """The controls of ``model`` on a store's activations, by name.

    Args:
        model: the k-SAE that they stand beside.
        rows: the pooled activations of the store.
        seed: of the drawn directions.
        source: which of the k-SAE's inputs they are of.
    """
    rows = model.normalized(rows, source)
    centered = rows - rows.mean(0)
    draw = generator(seed, "k-sae controls")
    random = torch.randn(model.n, model.d, generator=draw)
    picked = torch.randperm(len(rows), generator=draw)[: model.n]
    axes = torch.linalg.svd(centered, full_matrices=False).Vh
    directions = {
        "random directions": random,
        "data rows": centered[picked],
        "channels": signed(torch.eye(model.d)),
        "principal axes": signed(axes),
    }
    return {name: control_of(model, found, rows) for name, found in directions.items()}


def signed(directions: Float[Tensor, "a d"]) -> Float[Tensor, "two_a d"]:
    """Every direction, followed by its opposite: the first n are the leading axes with both signs."""
    return torch.stack([directions, -directions], 1).flatten(0, 1)


def control_of(
    model: "KSparseAutoencoder", directions: Float[Tensor, "a d"], rows: Float[Tensor, "images d"]
) -> "KSparseAutoencoder":
    """An autoencoder of ``model``'s k with given directions, as encoder and decoder, for its latents.

    Directions and rows are of normalized activations, where ``model`` normalizes. Codes have the one scale
    that reconstructs the rows best; of more directions than the k-SAE has latents the first are taken.
    """
    from revelio.sae.kernels.select import fastest_kernel, moved
    from revelio.sae.model import best_scale

    length = directions.norm(dim=1, keepdim=True)
    # A row equal to the mean has no direction.
    directions = directions[length[:, 0] > 0][: model.n]
    unit = directions / directions.norm(dim=1, keepdim=True)
    made = type(model)(model.d, len(unit), min(model.k, len(unit)), inputs=model.inputs, seed=None)
    with torch.no_grad():
        made.W_enc.copy_(unit)
        made.W_dec.copy_(unit)
        made.b_dec.copy_(rows.mean(0))
        made.W_enc.mul_(best_scale(made, rows))
    made.kernel = fastest_kernel(made)
    return moved(made, model.W_enc.device)


def judge(
    top: TopImages,
    latents: Int64[Tensor, " l"],
    images: int,
    subsets: Bool[Tensor, "subsets images"],
    seed: int = 0,
) -> Judged:
    """Mean purity of some latents over their first ``images`` images, of all and of each subset.

    Args:
        top: with :data:`SPARE` times as many images a latent.
        latents: which ones.
        images: how many a latent is judged by.
        subsets: which images of the store are left.
        seed: of the orders of the labels that intervals need; the same for models that are compared.

    Raises:
        ValueError: the images have no labels.
    """
    if top.labels is None:
        raise ValueError("the images have no labels: purity has no controls without them")
    classes = max(len(top.classes), int(top.labels.max()) + 1)
    found = mean_measures(
        top.indices[latents],
        top.labels,
        classes,
        images,
        subsets,
        shuffles(top.labels, seed),
        tuple(BETTER),
    )
    return Judged(len(latents), found)


def compare(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    config: PurityConfig | None = None,
    how: TopImagesConfig | None = None,
    *,
    confidence: float = 0.95,
    device: str | torch.device = "cpu",
    progress: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """A k-SAE's purity beside every control's: plain values, fit for JSON.

    Args:
        model: the k-SAE.
        store: labelled activations, better of images that it was not trained on.
        config: how many images a latent is judged by, how many of the strongest latents of each model are
            averaged, and the seed of the controls and of the subsets of images.
        how: which codes top images are chosen by, and what an image's code is.
        confidence: of all intervals together.
        device: where the k-SAE and the controls run.
        progress: told the name of each model before it is judged.

    Returns:
        ``controls``: by name, for each measure the control's value and the difference (the k-SAE's minus the
        control's) with its interval, and how many latents were averaged; ``verdict``: by measure, in words;
        ``intervals``: of the k-SAE's own values.
        A model without a latent that is active on enough images is left out.

    Raises:
        ValueError: the store has no labels, or its width is not the k-SAE's.
    """
    config = config or PurityConfig()
    images, latents, seed = config.m, config.latents, config.seed
    how = how or TopImagesConfig()
    how = replace(how, m=SPARE * images, over=over_cells(model, how))
    rows = _rows(store, how, seed)
    subsets = halves(store.images, seed)
    judged = {}
    for name, each in {"": model, **control_models(model, rows, seed, store.manifest)}.items():
        if progress is not None:
            progress(name or "k-SAE")
        top = top_images(each, store, how, device=device)
        strong = eligible(top, images)[:latents]
        # With few images a control may have no latent that is active on enough of them.
        if len(strong):
            judged[name] = judge(top, strong, images, subsets, seed)
    ours = judged.pop("", None)
    if ours is None or not judged:
        return {
            "latents": 0,
            "values": {},
            "controls": {},
            "verdict": {},
            "intervals": {},
            "interval_method": "",
        }
    return _entry(ours, judged, confidence)


def _rows(store: "ActivationStore", how: TopImagesConfig, seed: int) -> Float[Tensor, "images d"]:
    """What the k-SAE reads of each image: its pooled activation, or a cell of it, drawn."""
    if how.over == "pooled":
        return torch.cat([pooled(batch) for _, batch in store.batches(1024)])
    drawn = torch.randint(
        store.cells_an_image, (store.images,), generator=generator(seed, "a cell")
    )
    parts = []
    for start in range(0, store.images, 64):
        cells = store.image_cells(start, min(start + 64, store.images))
        parts.append(cells[torch.arange(len(cells)), drawn[start : start + len(cells)]])
    return torch.cat(parts)


def _entry(ours: Judged, judged: Mapping[str, Judged], confidence: float) -> dict[str, Any]:
    """What :func:`compare` gives; each control's interval is wide enough for all to hold together."""
    found = {
        measure: against(
            ours.measures[measure],
            {name: other.measures[measure] for name, other in judged.items()},
            BETTER[measure],
            confidence,
        )
        for measure in BETTER
    }
    return {
        "latents": ours.latents,
        "values": {measure: entry["value"] for measure, entry in found.items()},
        "intervals": {
            measure: within(interval(one, confidence), 0, HIGHEST[measure])
            for measure, one in ours.measures.items()
        },
        "controls": {
            name: {"latents": other.latents}
            | {measure: entry["controls"][name] for measure, entry in found.items()}
            for name, other in judged.items()
        },
        "verdict": {measure: entry["verdict"] for measure, entry in found.items()},
        "interval_method": method(confidence),
    }


def strongest(entry: Mapping[str, Any], measure: str = "majority") -> tuple[str, float]:
    """The control with the best value, and its value."""
    controls = entry["controls"]
    name = max(controls, key=lambda one: BETTER[measure] * controls[one][measure]["value"])
    return name, controls[name][measure]["value"]


def in_words(entry: Mapping[str, Any]) -> str:
    """What a purity entry's controls say of its majority share: the strongest, and what intervals support."""
    name, value = strongest(entry)
    said = entry["verdict"]["majority"]
    said = said if said.startswith("beats") else f"is {said}"
    return f"the strongest control dictionary, {name}, reaches {value:.0%}: the k-SAE {said}"
