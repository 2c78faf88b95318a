"""A k-SAE's measures beside those of its controls, and several trainings of one recipe as one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from jaxtyping import Float, Int64
from torch import Tensor

from revelio.analysis.paired import Measured, against, halves, verdict
from revelio.evaluation.encoded import Encoded, encoded
from revelio.evaluation.measures import MEASURES, HeldOut, held_out
from revelio.sae.inputs import Source
from revelio.sae.metrics import density_histogram
from revelio.sae.model import KSparseAutoencoder

Told = Callable[[str], object]
# How a model's latents fire, and its measures.
Taken = tuple[dict[str, Any], dict[str, Measured]]


def judge(
    models: Mapping[str, KSparseAutoencoder],
    rows: Float[Tensor, "images d"] | Float[Tensor, "images c d"],
    labels: Int64[Tensor, " images"] | None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    source: Source = None,
    over: Literal["max", "mean"] = "max",
    others: Mapping[str, tuple[KSparseAutoencoder, Tensor]] | None = None,
    known: dict[str, Taken] | None = None,
    progress: Told | None = None,
) -> dict[str, Any]:
    """Every measure of a k-SAE beside its controls: plain values, fit for JSON.

    Args:
        models: the k-SAE first, then the controls, by name.
        rows: activations of held-out images, or of all their cells.
        labels: their classes; without them only label-free measures are taken.
        confidence: of all intervals of a measure together.
        seed: of the halves and the subsets of the images.
        source: which input of the k-SAE the rows are of, for one that normalizes by store.
        over: what the codes of an image's cells come to for the image.
        others: controls of another backbone, with its activations of the same images.
        known: what was measured before of some of the models on these images; gets the rest.
        progress: told the name of each model before it is measured.

    Returns:
        ``latents``: live latents of each model; ``measures``: by name, as
        :func:`revelio.analysis.paired.against` gives it; ``not_measured``: what needs more images, classes or
        live latents than there are. A control without a latent that fires on enough images is left out of
        the measures that need one.
    """
    images = held_out(rows, labels, halves(len(rows), seed), seed)
    known = {} if known is None else known
    here = {name: (model, rows) for name, model in models.items()} | dict(others or {})
    for name, (model, own) in here.items():
        if name in known:
            continue
        if progress is not None:
            progress(name)
        codes = encoded(model, own, source if name in models else None, over)
        known[name] = (_firing(codes), measures_of(codes, replace(images, rows=own)))
    found = {name: known[name][1] for name in here}
    first, *controls = found
    entries = {
        measure: against(
            ours,
            {name: found[name][measure] for name in controls if measure in found[name]},
            MEASURES[measure].better,
            confidence,
        )
        for measure, ours in found[first].items()
    }
    wanted = [name for name, one in MEASURES.items() if labels is not None or not one.labelled]
    return {
        "latents": {name: known[name][0] for name in here},
        "measures": entries,
        "not_measured": [name for name in wanted if name not in entries],
    }


def measures_of(codes: Encoded, images: HeldOut) -> dict[str, Measured]:
    """All measures that these codes and images allow, by name."""
    labelled = images.labels is not None
    taken = {
        name: measure.function(codes, images)
        for name, measure in MEASURES.items()
        if labelled or not measure.labelled
    }
    return {name: value for name, value in taken.items() if value is not None}


def _firing(codes: Encoded) -> dict[str, Any]:
    images = len(codes.values)
    return {
        "n": codes.model.n,
        "firing": int((codes.firings > 0).sum()),
        "dead_share": float((codes.firings == 0).double().mean()),
        "more_than_10_images": int((codes.firings > 10).sum()),
        "l0": float(codes.firings.sum()) / max(images, 1),
        "density": density_histogram(codes.firings, images),
    }


def over_trainings(
    entries: Sequence[Mapping[str, Any]], confidence: float = 0.95
) -> dict[str, Any]:
    """Several trainings of one recipe as one: the mean difference to each control, and the verdict.

    The interval holds both sources of chance: which images were held out (the mean of the squared standard
    errors of the trainings, which share the images) and which training it was (the variance between trainings
    over their number, with Student's t).

    Args:
        entries: ``measures`` of each training's :func:`judge`.
        confidence: of all intervals of a measure together.
    """
    shared = [name for name in entries[0] if all(name in entry for entry in entries)]
    return {name: _combined([entry[name] for entry in entries], confidence) for name in shared}


def _combined(entries: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    import numpy as np
    from scipy import stats

    count = len(entries)
    names = [n for n in entries[0]["controls"] if all(n in one["controls"] for one in entries)]
    each = (1 + 1 - (1 - confidence) / max(len(names), 1)) / 2
    t = float(stats.t.ppf(each, count - 1))
    controls = {}
    for name in names:
        found = [one["controls"][name]["difference"] for one in entries]
        values = np.array([one["value"] for one in found])
        images = np.mean([((one["interval"][1] - one["interval"][0]) / 2) ** 2 for one in found])
        half = float((images + t**2 * values.var(ddof=1) / count) ** 0.5)
        middle = float(values.mean())
        controls[name] = {"value": middle, "interval": [middle - half, middle + half]}
    better = 1 if entries[0]["better"] == "higher" else -1
    return {
        "value": float(np.mean([one["value"] for one in entries])),
        "trainings": [one["value"] for one in entries],
        "differences": controls,
        "verdict": verdict({name: one["interval"] for name, one in controls.items()}, better),
    }
