"""Scores as text: plain tables from the JSON of `score`, and LLaVA's own summary."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.bench.files import CATEGORY_PREFIX
from eval.bench.prompts import Mode
from eval.bench.reviews import ALL, FAILED, Review
from revelio.text_tables import columns


def score_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Table 10's columns, with intervals and counts."""
    rows = []
    for name, entry in entries.items():
        relative, reference, model = published(entry["reference"], entry["model"])
        counts = [str(entry["questions"]), str(entry["failures"])]
        shown = [_number(relative), _interval(entry["relative_interval"])]
        rows.append([name, *counts, *shown, _number(reference), _number(model)])
    head = ["", "questions", "failures", "relative", "interval", "reference", "model"]
    return columns([head, *rows], "lr")


def published(
    reference: float | None, model: float | None
) -> tuple[float | None, float | None, float | None]:
    """Relative, reference's and model's score as LLaVA's summary rounds them.

    The means (here times ten) are rounded to three places before anything is made of them.
    """
    if reference is None or model is None:
        return None, None, None
    theirs, ours = round(reference / 10, 3), round(model / 10, 3)
    share = round(ours / theirs * 100, 1) if theirs else None
    return share, round(theirs * 10, 1), round(ours * 10, 1)


def compare_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The difference of two models' relative scores."""
    rows = [
        [
            name,
            str(entry["questions"]),
            _number(entry["difference"], "+.1f"),
            _interval(entry["interval"], "+.1f"),
            _number(entry["p"], ".4f"),
        ]
        for name, entry in entries.items()
    ]
    return columns([["", "questions", "difference", "interval", "p"], *rows], "lr")


def drift_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The reference's own score by run, and how far it moves."""
    rows = [
        [
            name,
            *(_number(mean) for mean in entry["reference"]),
            _number(entry["spread"]),
            _number(entry["question_sd"]),
            _number(entry["relative_shift"]),
        ]
        for name, entry in entries.items()
    ]
    runs = len(next(iter(entries.values()))["reference"])
    head = [
        "",
        *(f"run {n}" for n in range(1, runs + 1)),
        "spread",
        "question sd",
        "relative shift",
    ]
    return columns([head, *rows], "lr")


def position_text(entries: Mapping[str, Mapping[str, float]]) -> str:
    """One line a order: what both assistants get in it."""
    return "\n".join(
        f"{order.replace('_', ' ')}: reference {entry['reference']:.1f}, model {entry['model']:.1f}"
        for order, entry in entries.items()
    )


def llava_summary(name: str, reviews: Sequence[Review], mode: Mode) -> str:
    """LLaVA's published summary: name, then category, relative, reference x 10, model x 10 a line.

    Means are rounded to three places before the division, as there; ``as_paper`` keeps failures as -1.
    """
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for review in reviews:
        pair = review.scores or (FAILED if mode == "as_paper" else None)
        if pair is not None:
            if review.category:
                scores[CATEGORY_PREFIX + review.category].append(pair)
            scores[ALL].append(pair)
    lines = [name]
    for category, pairs in sorted(scores.items()):
        share, theirs, ours = published(*(10 * float(mean) for mean in np.mean(pairs, axis=0)))
        lines.append(f"{category} {float('nan') if share is None else share} {theirs} {ours}")
    return "\n".join([*lines, "=" * 33])


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


def _interval(value: Sequence[float] | None, form: str = ".1f") -> str:
    return "-" if value is None else f"[{value[0]:{form}}, {value[1]:{form}}]"
