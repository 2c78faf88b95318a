"""Purity: how alike the labels of a latent's top images are, over the strongest latents.

sigma_label (Sec. 4.2) is the mean, over the 1000 strongest latents, of the unbiased standard deviation of
the class ids of their 10 top images. Class ids are names, not numbers, so it changes when classes are
renumbered and its scale grows with their number: it comes with its chance level, and beside measures
that have no such fault (:mod:`revelio.analysis.label_measures`).
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.analysis.config import PurityConfig
from revelio.analysis.label_measures import (
    bootstrap_intervals,
    chance,
    class_counts,
    measures,
    permutation_null,
)
from revelio.analysis.similarity import chance_similarity, pair_similarity
from revelio.analysis.top_images import MIN_IMAGES, TopImages
from revelio.bounds import check_fields
from revelio.text_tables import columns
from revelio.wording import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

SERIES_STEP = 100
NO_LABELS = "the images have no labels: label measures are left out"
INTERVAL = (
    "95 % bootstrap over latents: too narrow where they share images (beside controls: over images)"
)


def purity(
    top: TopImages,
    config: PurityConfig | None = None,
    *,
    embeddings: Float[Tensor, "images d"] | None = None,
) -> dict[str, Any]:
    """The purity entry of one k-SAE: plain values, fit for JSON.

    Args:
        top: the top images of every latent.
        config: how many images and latents, and the resampling.
        embeddings: unit vectors of all images (:func:`~revelio.analysis.similarity.unit_vectors`), for
            the label-free measure.

    Raises:
        ValueError: a setting is outside its bounds, or ``top`` holds fewer images a latent than asked for.
    """
    config = config or PurityConfig()
    check_fields(config)
    if config.m > top.m:
        raise ValueError(
            f"purity over {plural(config.m, 'image')}, but each latent has {plural(top.m, 'top image')}: "
            f"give 2..{top.m}, or make top images with a larger m"
        )
    all_eligible = eligible(top, config.m)
    chosen = all_eligible[: config.latents]
    entry = _context(top) | {
        "top_images": config.m,
        "latents": len(chosen),
        "latents_wanted": config.latents,
        "eligible": len(all_eligible),
        "alive": int((top.counts > 0).sum()),
        "n": len(top.counts),
        "sigma_label": None,
        "notes": [],
    }
    if len(chosen) < config.latents:
        entry["notes"].append(
            f"only {plural(len(chosen), 'latent is', 'latents are')} active on more than "
            f"{plural(max(MIN_IMAGES, config.m - 1), 'image')}: means are over these, not {config.latents}"
        )
    rows = top.indices[chosen, : config.m]
    if top.labels is None:
        entry["notes"].append(NO_LABELS)
    elif len(chosen):
        entry |= _label_measures(top.labels, len(top.classes), rows, config)
    if embeddings is not None and len(chosen):
        entry |= _similarity(embeddings, rows, top.values[chosen, : config.m], config)
    return entry


def eligible(top: TopImages, images: int) -> Int64[Tensor, "latents"]:
    """Latents active on more than 10 images and on ``images`` at least, strongest first."""
    order = top.ranking()
    enough = (top.counts > MIN_IMAGES) & (top.counts >= images)
    return order[enough[order]]


def latent_measures(
    top: TopImages, latents: Int64[Tensor, "l"], images: int
) -> dict[str, Float[Tensor, "l"]]:
    """The label measures of single latents, over as many of their top images as there are.

    Raises:
        ValueError: the images have no labels.
    """
    if top.labels is None:
        raise ValueError(NO_LABELS)
    rows = top.indices[latents, :images]
    labels = torch.where(rows >= 0, top.labels[rows.clamp(min=0)], -1)
    return measures(class_counts(labels, _class_number(top.labels, len(top.classes))))


def _class_number(labels: Tensor, named: int) -> int:
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"a label is {int(labels.min())}: class ids start at 0")
    return max(named, int(labels.max()) + 1 if len(labels) else 0)


def _context(top: TopImages) -> dict[str, Any]:
    known = (
        "mode",
        "codes",
        "model",
        "dataset",
        "split",
        "layer",
        "timestep",
        "prompt_policy",
        "draw",
    )
    entry = {key: top.source[key] for key in known if key in top.source}
    return {"layer": None, "timestep": None} | entry | {"images": top.images}


def _label_measures(
    labels: Tensor, named: int, rows: Tensor, config: PurityConfig
) -> dict[str, Any]:
    classes, draws, seed = _class_number(labels, named), config.random_sets, config.seed
    found = measures(class_counts(labels[rows], classes))
    random = chance(labels, classes, images=config.m, draws=draws, seed=seed)
    z, p, _ = permutation_null(labels, rows, permutations=config.permutations, seed=seed)
    intervals = bootstrap_intervals(found, samples=config.bootstrap, seed=seed)
    means = {name: float(value.mean()) for name, value in found.items()}
    return {
        "sigma_label": means["sigma"],
        "interval": intervals["sigma"],
        "chance": random["sigma"][0],
        "chance_error": random["sigma"][1] / math.sqrt(draws),
        "chance_draws": draws,
        "majority_share": means["majority"],
        "entropy": means["entropy"],
        "same_class_pairs": means["pairs"],
        "null_z": None if math.isnan(z) else z,
        "null_p": p,
        "null_permutations": config.permutations,
        "intervals": renamed(intervals),
        "interval_method": INTERVAL,
        "chance_levels": renamed({name: value[0] for name, value in random.items()}),
        "series": _series(found["sigma"]),
        "classes": classes,
    }


def renamed(by_measure: Mapping[str, Any]) -> dict[str, Any]:
    """By the names that an entry gives the measures."""
    names = {"sigma": "sigma_label", "majority": "majority_share", "pairs": "same_class_pairs"}
    return {names.get(name, name): value for name, value in by_measure.items()}


def _series(sigma: Tensor) -> dict[str, float]:
    """Mean sigma of the first 100, 200, ... latents, keyed as in the released `average_stds.json`."""
    counts = range(SERIES_STEP, len(sigma) + 1, SERIES_STEP)
    return {str(count): float(sigma[:count].mean()) for count in counts}


def _similarity(units: Tensor, rows: Tensor, codes: Tensor, config: PurityConfig) -> dict[str, Any]:
    plain, weighted = pair_similarity(units, rows, codes)
    found = {"similarity": plain, "similarity_weighted": weighted}
    return {
        "similarity": float(plain.mean()),
        "similarity_weighted": float(weighted.mean()),
        "similarity_chance": chance_similarity(units),
        "similarity_intervals": bootstrap_intervals(
            found, samples=config.bootstrap, seed=config.seed
        ),
    }


def table(entries: "Sequence[dict[str, Any]]") -> str:
    """The entries as aligned text, a line each."""
    names = ("name", "layer", "timestep", "latents", "sigma_label", "chance", "majority_share")
    names += ("entropy", "same_class_pairs", "null_z", "similarity")
    shown = [name for name in names if any(entry.get(name) is not None for entry in entries)]
    return columns([shown, *([_cell(entry.get(name)) for name in shown] for entry in entries)], "r")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
