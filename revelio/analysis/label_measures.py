"""Measures of how alike the labels of a latent's top images are, and their chance levels.

Everything is a function of the class counts of w images, c_1 .. c_C (sum w):

    sigma     unbiased standard deviation of the raw class ids (Sec. 4.2); depends on their order
    majority  max_j c_j / w
    entropy   -sum_j p_j log2 p_j / log2 min(w, C), p = c / w: 0 for one class, 1 when all differ
    pairs     sum_j c_j (c_j - 1) / (w (w - 1)), the share of image pairs of the same class

The last three do not change when classes are renumbered.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from revelio.analysis.paired import Measured
from revelio.seeds import key_seed


def class_counts(labels: Int64[Tensor, "l w"], classes: int) -> Int64[Tensor, "l classes"]:
    """How many of the w images of each latent are of each class; labels below 0 are left out."""
    counts = torch.zeros(len(labels), classes, dtype=torch.int64)
    present = labels >= 0
    return counts.scatter_add_(1, labels.clamp(min=0), present.long())


def kept_counts(
    rows: Int64[Tensor, "l m"],
    labels: Int64[Tensor, "images"],
    classes: int,
    kept: Bool[Tensor, "images"],
    images: int,
) -> Int64[Tensor, "l classes"]:
    """Class counts of each latent's first ``images`` images among those that are kept; row -1 is no image."""
    safe = rows.clamp(min=0)
    left = (rows >= 0) & kept[safe]
    first = left & (left.cumsum(1) <= images)
    return class_counts(torch.where(first, labels[safe], -1), classes)


def measures(counts: Int64[Tensor, "l classes"]) -> dict[str, Float[Tensor, "l"]]:
    """The four measures of each row of class counts; NaN where too few images define one."""
    return {name: form(counts.double()) for name, form in FORMS.items()}


def mean_measures(
    rows: Int64[Tensor, "l m"],
    labels: Int64[Tensor, "images"],
    classes: int,
    images: int,
    subsets: Bool[Tensor, "subsets images"],
    shuffled: Int64[Tensor, "shuffles images"],
    names: Sequence[str],
) -> dict[str, Measured]:
    """Measures of each latent's first ``images`` images, averaged over latents: with all that intervals need.

    Args:
        rows: the images of each latent, strongest first, with others to move up in a subset; -1 is no image.
        labels: their classes.
        classes: how many.
        images: how many a latent is judged by.
        subsets: :func:`revelio.analysis.paired.halves`.
        shuffled: :func:`revelio.analysis.paired.shuffles`.
        names: which measures.
    """

    def means(labels: Tensor, kept: Tensor) -> list[float]:
        counts = kept_counts(rows, labels, classes, kept, images).double()
        # A latent with one image left has no deviation and no pair.
        return [float(FORMS[name](counts).nan_to_num(0.0).mean()) for name in names]

    everything = torch.ones(len(labels), dtype=torch.bool)
    whole = means(labels, everything)
    parts = torch.tensor([means(labels, kept) for kept in subsets], dtype=torch.float64).T
    permuted = torch.tensor([means(each, everything) for each in shuffled], dtype=torch.float64).T
    return {
        name: Measured(whole[i], parts[i], steady=True, shuffled=permuted[i])
        for i, name in enumerate(names)
    }


def _sigma(c: Tensor) -> Tensor:
    w, ids = c.sum(1), torch.arange(c.shape[1], dtype=torch.float64)
    centred = ids - (c @ ids / w)[:, None]
    return ((c * centred**2).sum(1) / (w - 1)).sqrt()


def _majority(c: Tensor) -> Tensor:
    return (c / c.sum(1, keepdim=True)).amax(1)


def _entropy(c: Tensor) -> Tensor:
    w = c.sum(1)
    share = c / w[:, None]
    bits = -(share * share.clamp(min=1e-300).log2()).sum(1)
    most = w.clamp(max=c.shape[1]).log2()
    # One class, or one image, leaves no room for disorder.
    return torch.where(most > 0, bits / most, torch.zeros_like(bits)).abs()


def _pairs(c: Tensor) -> Tensor:
    w = c.sum(1)
    return (c * (c - 1)).sum(1) / (w * (w - 1))


# Each of class counts as float64.
FORMS = {"sigma": _sigma, "majority": _majority, "entropy": _entropy, "pairs": _pairs}
MEASURES = tuple(FORMS)


def chance(
    labels: Int64[Tensor, "images"], classes: int, *, images: int, draws: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the measures over sets of ``images`` random images.

    The images are drawn without repetition from the labels at hand, ``draws`` times. The standard error
    of a mean is its deviation over the square root of ``draws``.
    """
    colours = np.bincount(labels.numpy(), minlength=classes)
    rng = np.random.default_rng(key_seed(seed, "purity chance", images, draws))
    counts = rng.multivariate_hypergeometric(colours, images, size=draws)
    drawn = measures(torch.from_numpy(counts))
    return {name: (float(drawn[name].mean()), float(drawn[name].std())) for name in MEASURES}


def permutation_null(
    labels: Int64[Tensor, "images"], rows: Int64[Tensor, "l w"], *, permutations: int, seed: int
) -> tuple[float, float, float]:
    """The same-class pair rate against labels shuffled over the whole store.

    The statistic is the mean pair rate over the latents, so that latents that share images are not
    counted as independent.

    Returns:
        (z, p, null mean): z = (observed - null mean) / null deviation; p is one-sided,
        (1 + shuffles that reach the observed) / (1 + shuffles).
    """
    rng = np.random.default_rng(key_seed(seed, "purity permutations", permutations))
    observed = _pair_rate(labels[rows])
    shuffled = labels.numpy().copy()
    null = np.empty(permutations)
    for i in range(permutations):
        null[i] = _pair_rate(torch.from_numpy(rng.permutation(shuffled))[rows])
    deviation = float(null.std(ddof=1))
    z = (observed - float(null.mean())) / deviation if deviation > 1e-12 else math.nan
    p = (1 + int((null >= observed - 1e-12).sum())) / (1 + permutations)
    return z, p, float(null.mean())


def _pair_rate(labels: Int64[Tensor, "l w"]) -> float:
    w = labels.shape[1]
    same = labels[:, :, None] == labels[:, None, :]
    return (int(same.sum()) - labels.numel()) / (len(labels) * w * (w - 1))


def bootstrap_intervals(
    values: Mapping[str, Float[Tensor, "l"]], *, samples: int, seed: int
) -> dict[str, list[float]]:
    """95 % percentile intervals of the means, by drawing latents with repetition."""
    length = len(next(iter(values.values())))
    rng = np.random.default_rng(key_seed(seed, "purity bootstrap", samples))
    chosen = torch.from_numpy(rng.integers(0, length, size=(samples, length)))
    intervals = {}
    for name, value in values.items():
        means = value.double()[chosen].mean(1).numpy()
        intervals[name] = [float(bound) for bound in np.quantile(means, [0.025, 0.975])]
    return intervals
