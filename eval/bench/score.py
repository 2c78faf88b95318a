"""The scores of Table 10, and how sure they are.

    relative = 100 * mean(model) / mean(reference)        reference, model = 10 * mean

over the questions of a category, or over all of them (`all` pools the questions, it does not average the
categories). Intervals are percentile bootstraps over questions: a question is drawn with both its scores,
so that an easy question helps both. Two models are compared on the same questions: the difference of
relatives, its paired bootstrap interval, and a permutation test that swaps the models question by question.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from eval.bench.reviews import Scores, align
from revelio.seeds import key_seed

SCALE = 10.0  # scores of 1..10 are published times ten


def relative(
    reference: Float[np.ndarray, "... q"], model: Float[np.ndarray, "... q"]
) -> np.ndarray:
    """100 * mean(model) / mean(reference) over the last axis; nan where the reference's mean is 0."""
    below = reference.mean(-1)
    above = 100 * model.mean(-1)
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)


def draws(questions: int, resamples: int, *key: str | int) -> np.ndarray:
    """Rows of questions drawn with replacement, ``(resamples, questions)``, by a keyed generator."""
    generator = np.random.default_rng(key_seed(*key))
    return generator.integers(0, questions, (resamples, questions))


def interval(values: Float[np.ndarray, "r"], confidence: float) -> list[float] | None:
    """The central interval of resampled values; None when no value is finite."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    tail = (1 - confidence) / 2
    return [float(edge) for edge in np.quantile(finite, [tail, 1 - tail])]


def table(scores: Scores, *, resamples: int, confidence: float, seed: int) -> dict[str, Any]:
    """The entries of one review file, by category."""
    return {
        name: _entry(scores, name, resamples=resamples, confidence=confidence, seed=seed)
        for name in scores.names()
    }


def _entry(
    scores: Scores, name: str, *, resamples: int, confidence: float, seed: int
) -> dict[str, Any]:
    rows = scores.rows(name)
    reviews = [review for review in scores.reviews if name in ("all", review.category)]
    counts = {
        "questions": len(rows),
        "reviews": len(reviews),
        "failures": sum(review.scores is None for review in reviews),
        "half_answered": len({review.question_id for review in reviews} & set(scores.half)),
    }
    if not len(rows):
        return counts | dict.fromkeys(("relative", "relative_interval", "reference", "model"))
    theirs, ours = scores.reference[rows], scores.model[rows]
    drawn = draws(len(rows), resamples, seed, "bootstrap", name)
    return counts | {
        "relative": _number(relative(theirs, ours)),
        "relative_interval": _interval_of(relative(theirs[drawn], ours[drawn]), rows, confidence),
        "reference": SCALE * float(theirs.mean()),
        "reference_interval": _interval_of(SCALE * theirs[drawn].mean(-1), rows, confidence),
        "model": SCALE * float(ours.mean()),
        "model_interval": _interval_of(SCALE * ours[drawn].mean(-1), rows, confidence),
    }


def _interval_of(values: np.ndarray, rows: np.ndarray, confidence: float) -> list[float] | None:
    # One question says nothing about how questions vary.
    return interval(values, confidence) if len(rows) > 1 else None


def _number(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None


def compare(
    scores: Scores, other: Scores, *, resamples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """relative(scores) - relative(other) by category, with interval and two-sided p-value.

    Raises:
        ValueError: the files review other questions; names the ids.
    """
    mine, theirs = align(scores, [other])
    categories = np.array(scores.categories)[mine]
    quads = np.stack(
        [scores.reference[mine], scores.model[mine], other.reference[theirs], other.model[theirs]]
    )
    result = {}
    for name in scores.names():
        rows = np.arange(len(mine)) if name == "all" else np.flatnonzero(categories == name)
        if len(rows):
            drawn = draws(len(rows), resamples, seed, "bootstrap", name)
            part = quads[:, rows]
            result[name] = {
                "questions": len(rows),
                "difference": _number(_difference(part)),
                "interval": _interval_of(_difference(part[:, drawn]), rows, confidence),
                "p": permutation_p(part, resamples, seed, "permutation", name),
            }
    return result


def _difference(quads: Float[np.ndarray, "4 ... q"]) -> np.ndarray:
    return relative(quads[0], quads[1]) - relative(quads[2], quads[3])


def permutation_p(quads: Float[np.ndarray, "4 q"], resamples: int, *key: str | int) -> float | None:
    """Two-sided p-value of no difference: the models' score pairs are swapped at random by question.

    (1 + shuffles at least as far from 0) / (1 + shuffles), which is never 0; None without a relative.
    """
    seen = _difference(quads)
    if not np.isfinite(seen):
        return None
    swap = np.random.default_rng(key_seed(*key)).integers(0, 2, (resamples, quads.shape[1])) == 1
    first, second = quads[:2, None], quads[2:, None]
    shuffled = np.concatenate([np.where(swap, second, first), np.where(swap, first, second)])
    far = np.abs(_difference(shuffled)) >= np.abs(seen) - 1e-9
    return float((1 + far.sum()) / (1 + resamples))


def positions(scores: Scores) -> dict[str, dict[str, float]]:
    """Mean scores by the order shown, over questions scored in every order: the judge's seat bias.

    Empty when the file has one order.
    """
    by_order: dict[str, dict[str, tuple[float, float]]] = {}
    for review in scores.reviews:
        found = by_order.setdefault(review.order, {})
        if review.scores is not None:
            found[review.question_id] = review.scores
    common = set.intersection(*map(set, by_order.values()))
    if len(by_order) < 2 or not common:
        return {}
    result = {}
    for order, found in by_order.items():
        theirs, ours = SCALE * np.array([found[one] for one in sorted(common)]).mean(0)
        result[order] = {"reference": float(theirs), "model": float(ours)}
    return result


def drift(files: list[Scores]) -> dict[str, Any]:
    """How far the reference's own score moves between runs, by category.

    The reference's answers are the same in every run: what moves is the judge, and with it every relative
    score. `question_sd` is the mean over questions of the reference's standard deviation over runs;
    `relative_shift` is how far the first file's relative would move if only the reference's score did.

    Raises:
        ValueError: the files review other questions; names the ids.
    """
    rows = align(files[0], files[1:])
    reference = np.stack([file.reference[row] for file, row in zip(files, rows, strict=True)])
    model, categories = files[0].model[rows[0]], np.array(files[0].categories)[rows[0]]
    result = {}
    for name in files[0].names():
        kept = np.ones(len(categories), bool) if name == "all" else categories == name
        if kept.any():
            means = SCALE * reference[:, kept].mean(1)
            shifted = 100 * SCALE * model[kept].mean() / means[means != 0]
            result[name] = {
                "questions": int(kept.sum()),
                "reference": [float(mean) for mean in means],
                "spread": float(np.ptp(means)),
                "question_sd": SCALE * float(reference[:, kept].std(0, ddof=1).mean()),
                "relative_shift": float(np.ptp(shifted)) if len(shifted) else None,
            }
    return result
