"""What a k-SAE is measured by on held-out images: one function a measure, one entry of :data:`MEASURES` each.

| measure                | what it is                                                                        |
|------------------------|-----------------------------------------------------------------------------------|
| fvu                    | fraction of variance unexplained                                                  |
| cosine                 | of an activation and its reconstruction, about the mean activation                |
| purity                 | majority share of the labels of a latent's 10 top images, 1,000 strongest latents |
| distinct purity        | the same, near-duplicate latents counted once                                     |
| sigma_label, entropy,  | the other forms of purity (:mod:`revelio.analysis.label_measures`)                |
| same-class pairs       |                                                                                   |
| probe 1, 5, 20         | balanced accuracy of a logistic regression a class on its best latents            |
| coverage 0.5, 0.8      | share of classes with a latent of F1 above 0.5, 0.8                               |
| significant            | share of latents whose top images hold more of a class than chance allows         |

Latents and thresholds of probes and coverage are chosen on one half of the images and judged on the other.
Every measure is a function of a set of images, so that differences have intervals
(:mod:`revelio.analysis.paired`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.analysis.label_measures import kept_counts, mean_measures
from revelio.analysis.paired import Measured, measured, shuffles
from revelio.evaluation.encoded import Encoded, first_of_each
from revelio.seeds import generator

TOP = 10
STRONGEST = 1000
MIN_FIRINGS = 11  # "active on more than 10 images", as purity has it
# A latent's images are kept this many times over, so that others move up in a half of the images.
SPARE = 3
DUPLICATE_COSINE = 0.9
DUPLICATE_IMAGES = 0.5
FALSE_DISCOVERIES = 0.05


@dataclass(frozen=True)
class HeldOut:
    """The held-out images.

    Attributes:
        rows: their activations, or those of all their cells.
        labels: class ids from 0, or None.
        classes: how many.
        subsets: of the images; see :func:`revelio.analysis.paired.halves`.
        judged: the half that probes and coverage are judged on.
        shuffled: the labels in random orders; see :func:`revelio.analysis.paired.shuffles`.
    """

    rows: Float[Tensor, "images d"] | Float[Tensor, "images c d"]
    labels: Int64[Tensor, " images"] | None
    classes: int
    subsets: Bool[Tensor, "subsets images"]
    judged: Bool[Tensor, " images"]
    shuffled: Int64[Tensor, "shuffles images"] | None


@dataclass(frozen=True)
class Measure:
    """A measure, and which way is better (1: higher)."""

    function: Callable[[Encoded, HeldOut], Measured | None]
    better: int
    labelled: bool = True


def held_out(
    rows: Float[Tensor, "images d"] | Float[Tensor, "images c d"],
    labels: Int64[Tensor, " images"] | None,
    subsets: Bool[Tensor, "subsets images"],
    seed: int,
) -> HeldOut:
    """The images with their halves: every class is halved, so that both halves have it."""
    if labels is None:
        return HeldOut(rows, None, 0, subsets, torch.ones(len(rows), dtype=torch.bool), None)
    names, places = torch.unique(labels, return_inverse=True)
    order = torch.randperm(len(rows), generator=generator(seed, "probe halves"))
    judged = torch.zeros(len(rows), dtype=torch.bool)
    for name in range(len(names)):
        judged[order[places[order] == name][::2]] = True
    return HeldOut(rows, places, len(names), subsets, judged, shuffles(places, seed))


def fvu(codes: Encoded, images: HeldOut) -> Measured:
    """Sum of squared errors / sum of squared deviations from the mean activation."""
    mean = images.rows.flatten(0, -2).mean(0)
    deviations = (images.rows - mean).double().square().flatten(1).sum(1)
    return measured(
        lambda kept: float(codes.errors[kept].sum() / deviations[kept].sum()), images.subsets
    )


def cosine(codes: Encoded, images: HeldOut) -> Measured:
    """Mean cosine of activation and reconstruction, about the mean activation.

    A subset's is about its own mean activation, to first order: otherwise the interval would not hold the
    chance of that mean.
    """
    rows = images.rows.mean(1) if images.rows.ndim == 3 else images.rows
    shifts = (rows - rows.mean(0)).double() @ codes.slope
    return measured(lambda kept: float((codes.cosines + shifts)[kept].mean()), images.subsets)


def purity(form: str) -> Callable[[Encoded, HeldOut], Measured | None]:
    """The mean of a form of purity over the strongest latents."""
    return lambda codes, images: _purity(
        codes, images, codes.strongest(STRONGEST, MIN_FIRINGS), form
    )


def distinct_purity(codes: Encoded, images: HeldOut) -> Measured | None:
    """Purity with near-duplicate latents left out, the strongest of each kept."""
    return _purity(codes, images, distinct(codes, codes.strongest(STRONGEST, MIN_FIRINGS)))


def _purity(
    codes: Encoded, images: HeldOut, latents: Tensor, form: str = "majority"
) -> Measured | None:
    if images.labels is None or images.shuffled is None or not len(latents):
        return None
    top = _top_images(codes, latents, SPARE * TOP)
    found = mean_measures(
        top, images.labels, images.classes, TOP, images.subsets, images.shuffled, [form]
    )
    return found[form]


def _top_images(codes: Encoded, latents: Tensor, count: int) -> Int64[Tensor, "l count"]:
    top = torch.full((len(latents), count), -1, dtype=torch.int64)
    for place, latent in enumerate(latents.tolist()):
        images = codes.top(latent)[0][:count]
        top[place, : len(images)] = images
    return top


def distinct(codes: Encoded, latents: Int64[Tensor, " l"]) -> Int64[Tensor, " m"]:
    """The latents without those that nearly repeat a stronger one.

    A latent repeats another if the cosine of their decoder rows is above :data:`DUPLICATE_COSINE` or more
    than :data:`DUPLICATE_IMAGES` of their top images are the same.
    """
    directions = torch.nn.functional.normalize(codes.model.W_dec.data[latents].float(), dim=1)
    alike = directions @ directions.T > DUPLICATE_COSINE
    shown = torch.zeros(len(latents), len(codes.values))
    top = _top_images(codes, latents, TOP)
    shown.scatter_add_(1, top.clamp(min=0), (top >= 0).float())
    alike |= (shown @ shown.T) / TOP > DUPLICATE_IMAGES
    return latents[first_of_each(alike)]


def probe(count: int) -> Callable[[Encoded, HeldOut], Measured | None]:
    """Sparse probing: balanced accuracy a class, by its ``count`` latents that differ most in the mean code.

    0.5 is chance. After Gurnee et al. (2023), "Finding Neurons in a Haystack".
    """

    def function(codes: Encoded, images: HeldOut) -> Measured | None:
        if images.labels is None or images.classes < 2:
            return None
        chosen, labels = ~images.judged, images.labels.numpy()
        matrix = codes.matrix
        fitted, judged = matrix[chosen.numpy()].tocsc(), matrix[images.judged.numpy()].tocsc()
        right = np.stack(
            [
                _right(fitted, judged, labels[chosen] == one, labels[images.judged] == one, count)
                for one in range(images.classes)
            ]
        )
        return _balanced(torch.from_numpy(right), images)

    return function


def _right(
    fitted: Any, judged: Any, positive: np.ndarray, truth: np.ndarray, count: int
) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    if not positive.any() or positive.all():
        return truth == positive.all()
    gap = np.abs(fitted[positive].mean(0) - fitted[~positive].mean(0))
    best = np.argsort(-np.asarray(gap).ravel(), kind="stable")[:count]
    features, others = fitted[:, best].toarray(), judged[:, best].toarray()
    scale = features.std(0) + 1e-9
    model = LogisticRegression(class_weight="balanced", max_iter=200)
    return model.fit(features / scale, positive).predict(others / scale) == truth


def _balanced(right: Bool[Tensor, "classes judged"], images: HeldOut) -> Measured:
    """Mean over classes of (sensitivity + specificity) / 2."""
    assert images.labels is not None
    truth = images.labels[images.judged] == torch.arange(images.classes)[:, None]

    def accuracy(kept: Tensor) -> float:
        kept = kept[images.judged]
        yes, no = truth & kept, ~truth & kept
        rates = [(right & part).sum(1) / part.sum(1) for part in (yes, no)]
        # A class without an image in a subset says nothing.
        return float(((rates[0] + rates[1]) / 2).nanmean())

    return measured(accuracy, images.subsets)


def coverage(above: float) -> Callable[[Encoded, HeldOut], Measured | None]:
    """The share of classes with a latent whose F1 is above ``above``.

    On one half of the images a class's latent and threshold of highest F1 are chosen, among its 20 latents of
    highest F1 at threshold 0; on the other half they are judged.
    """

    def function(codes: Encoded, images: HeldOut) -> Measured | None:
        if images.labels is None or images.classes < 2:
            return None
        fires = torch.stack([_fires(codes, images, one) for one in range(images.classes)])
        truth = images.labels[images.judged] == torch.arange(images.classes)[:, None]

        def covered(kept: Tensor) -> float:
            kept = kept[images.judged]
            hit = (fires & truth & kept).sum(1)
            score = 2 * hit / ((fires & kept).sum(1) + (truth & kept).sum(1)).clamp(min=1)
            return float((score > above).double().mean())

        return measured(covered, images.subsets, steady=True)

    return function


def _fires(codes: Encoded, images: HeldOut, one: int) -> Bool[Tensor, " judged"]:
    """On which judged images the class's detector fires."""
    latent, threshold = detector(codes, images, one)
    values = codes.matrix[:, [latent]].toarray().ravel()[images.judged.numpy()]
    return torch.from_numpy(values >= threshold) & torch.from_numpy(values > 0)


def detector(codes: Encoded, images: HeldOut, one: int) -> tuple[int, float]:
    """The latent and the threshold of highest F1 for a class, on the half that is not judged."""
    assert images.labels is not None
    chosen = (~images.judged).numpy()
    truth = (images.labels == one).numpy()
    matrix = codes.matrix
    fitted, positive = matrix[chosen], truth[chosen]
    firings = np.asarray((fitted > 0).sum(0)).ravel()
    hits = np.asarray((fitted[positive] > 0).sum(0)).ravel()
    scores = 2 * hits / np.maximum(firings + positive.sum(), 1)
    best, found = (-1.0, 0, 0.0), fitted.tocsc()
    for latent in np.argsort(-scores, kind="stable")[:20].tolist():
        values = found[:, [latent]].toarray().ravel()
        score, threshold = _best_threshold(values, positive)
        best = max(best, (score, -latent, threshold))
    _, latent, threshold = best
    return -latent, threshold


def _best_threshold(values: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """The highest F1 of "value >= threshold" over all thresholds above 0, and its threshold."""
    order = np.argsort(-values, kind="stable")
    ranked, hits = values[order], positive[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + positive.sum())
    # Only the last of equal values is a threshold.
    f1[~((ranked > 0) & (np.append(ranked[1:], -np.inf) < ranked))] = -1.0
    place = int(f1.argmax())
    return float(f1[place]), float(ranked[place])


def significant(codes: Encoded, images: HeldOut) -> Measured | None:
    """The share of the strongest latents whose top images hold more of their commonest class than chance.

    Exact hypergeometric tail, times the number of classes, under a false-discovery rate of 5 %
    (Benjamini and Hochberg, 1995). Of no more images than top images no latent's hold more of a class than
    chance: where a subset has so few, nothing is measured.
    """
    from scipy import stats

    latents = codes.strongest(STRONGEST, MIN_FIRINGS)
    if images.labels is None or not len(latents) or int(images.subsets.sum(1).min()) <= TOP:
        return None
    top, labels = _top_images(codes, latents, SPARE * TOP), images.labels

    def share(kept: Tensor) -> float:
        counts = kept_counts(top, labels, images.classes, kept, TOP).numpy()
        sizes = torch.bincount(labels[kept], minlength=images.classes).numpy()
        # The tail depends on the count and on the class's size alone.
        table = stats.hypergeom.sf(np.arange(TOP + 1)[:, None] - 1, int(kept.sum()), sizes, TOP)
        tails = table[counts, np.arange(images.classes)].min(1)
        p = np.minimum(1.0, tails * images.classes)
        return float((stats.false_discovery_control(p) <= FALSE_DISCOVERIES).mean())

    return measured(share, images.subsets, steady=True)


MEASURES: dict[str, Measure] = {
    "fvu": Measure(fvu, -1, labelled=False),
    "cosine": Measure(cosine, 1, labelled=False),
    "purity": Measure(purity("majority"), 1),
    "distinct purity": Measure(distinct_purity, 1),
    "sigma_label": Measure(purity("sigma"), -1),
    "entropy": Measure(purity("entropy"), -1),
    "same-class pairs": Measure(purity("pairs"), 1),
    "probe 1": Measure(probe(1), 1),
    "probe 5": Measure(probe(5), 1),
    "probe 20": Measure(probe(20), 1),
    "coverage 0.5": Measure(coverage(0.5), 1),
    "coverage 0.8": Measure(coverage(0.8), 1),
    "significant": Measure(significant, 1),
}
