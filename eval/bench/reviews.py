"""Finished reviews, ours or of LLaVA's own form, one row a question.

A line needs `question_id` and `tuple` (or `score`) [reference, model]; without `category`
(`llava_bench_conv`, ...) it counts in `all` alone, as in LLaVA's summary. Where a
question was judged in several orders its scores are averaged first, so that each question counts once; one
that lacks the score of an order is left out and counted.

Mode `fixed` leaves failures out: a null `tuple`, or LLaVA's [-1, -1]. Mode `as_paper` keeps them in the
means as -1, as LLaVA's summary does.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from eval.bench.files import CATEGORY_PREFIX, match_ids, read_lines
from eval.bench.prompts import Mode
from revelio.wording import plural

ALL = "all"
FAILED = (-1.0, -1.0)  # LLaVA's mark of a reply without two scores


@dataclass(frozen=True)
class Review:
    """One judged pair; ``scores`` is (reference, model), or None for a failure."""

    question_id: str
    category: str
    order: str
    scores: tuple[float, float] | None


@dataclass(frozen=True)
class Scores:
    """One file's scores by question (q questions).

    Questions without a score are left out, and of a file with both orders those that lack the score of one:
    the judge's seat bias would not cancel. ``half`` are the ids of the latter.
    """

    path: Path
    ids: tuple[str, ...]
    categories: tuple[str, ...]
    reference: Float[np.ndarray, "q"]
    model: Float[np.ndarray, "q"]
    reviews: tuple[Review, ...]
    half: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """``all``, then the categories by name: those that have a review, scored or not."""
        return [ALL, *sorted({review.category for review in self.reviews} - {""})]

    @property
    def counted(self) -> list[Review]:
        """The reviews of questions that were scored in every order, and those without a score."""
        return [review for review in self.reviews if review.question_id not in self.half]

    def rows(self, category: str) -> np.ndarray:
        """The positions of a category's questions."""
        if category == ALL:
            return np.arange(len(self.ids))
        return np.flatnonzero(np.array(self.categories) == category)


def read_reviews(path: Path) -> tuple[Review, ...]:
    """The reviews of a file.

    Raises:
        ValueError: a line is broken or lacks something, or a pair stands twice; names the line.
    """
    rows = read_lines(path, ())
    if not rows:
        raise ValueError(f"{path} holds no reviews")
    reviews = tuple(_review(row, f"{path} review {n}") for n, row in enumerate(rows, start=1))
    seen: set[tuple[str, str]] = set()
    for review in reviews:
        if (pair := (review.question_id, review.order)) in seen:
            raise ValueError(f"{path} reviews question {pair[0]} ({pair[1]}) more than once")
        seen.add(pair)
    return reviews


def _review(row: Mapping[str, Any], where: str) -> Review:
    if "question_id" not in row and "id" not in row:
        raise ValueError(f"{where} lacks question_id")
    if "tuple" not in row and "score" not in row:
        raise ValueError(f"{where} lacks tuple: it has {', '.join(row)}")
    scores = row["tuple"] if "tuple" in row else row["score"]
    if scores is not None and not _is_pair(scores):
        raise ValueError(f"{where}: tuple must be [reference, model], not {scores!r}")
    return Review(
        question_id=str(row.get("question_id", row.get("id"))),
        category=str(row.get("category") or "").removeprefix(CATEGORY_PREFIX),
        order=str(row.get("order", "reference_first")),
        scores=None if scores is None or min(scores) < 0 else (float(scores[0]), float(scores[1])),
    )


def _is_pair(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(score) in (int, float) and math.isfinite(score) for score in value)


def read_scores(path: Path, mode: Mode) -> Scores:
    """A file's reviews, averaged by question.

    Raises:
        ValueError: the file is broken, or nothing in it has a score.
    """
    reviews = read_reviews(path)
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for review in reviews:
        scores = review.scores or (FAILED if mode == "as_paper" else None)
        if scores is not None:
            pairs[review.question_id, review.category].append(scores)
    if not pairs:
        failures = plural(len(reviews), "review is a failure", "reviews are failures")
        raise ValueError(f"{path} holds no scores: its {failures}")
    orders = len({review.order for review in reviews})
    half = tuple(key[0] for key, found in pairs.items() if len(found) < orders)
    pairs = {key: found for key, found in pairs.items() if len(found) == orders}
    if not pairs:
        raise ValueError(f"{path} holds no question that was scored in both orders")
    means = np.array([np.mean(found, axis=0) for found in pairs.values()])
    ids, categories = zip(*pairs, strict=True)
    return Scores(path, ids, categories, means[:, 0], means[:, 1], reviews, half)


def align(first: Scores, others: Sequence[Scores]) -> list[np.ndarray]:
    """Rows of each file (the first, then the others) that belong to the same questions.

    A question that failed in one file is left out of all.

    Raises:
        ValueError: a file reviews other questions than the first; names the ids.
    """
    asked = {review.question_id: None for review in first.reviews}
    for other in others:
        theirs = {review.question_id: None for review in other.reviews}
        match_ids(asked, theirs, str(first.path), str(other.path))
    files = [first, *others]
    positions = [{one: row for row, one in enumerate(file.ids)} for file in files]
    common = [one for one in first.ids if all(one in place for place in positions)]
    return [np.array([place[one] for one in common], dtype=int) for place in positions]
