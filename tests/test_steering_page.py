"""The proof's page says what its figures say, and its verdicts follow from them."""

import json
from pathlib import Path

from tools.steering.page import text, verdict
from tools.steering.report import chosen

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_is_made_from_its_figures():
    found = json.loads((DOCS / "steering.json").read_text())
    assert text(found) == (DOCS / "steering.md").read_text()
    for name in ("erased", "others", "into"):
        assert (DOCS / f"steering_{name}.png").is_file()


def share(value: float, spread: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def entry(route: str, target: float, others: float, base: tuple[str, ...] = ()) -> dict:
    rates = {"target": share(target), "target_relative": share(target), "others": share(others)}
    return {"route": route, **rates, "survival": share(others), "better_than": dict.fromkeys(base)}


def test_a_verdict_needs_both_bounds_and_intervals_apart():
    base = entry("baseline", 0.3, 0.8)
    cases = {
        "both": (entry("text", 0.05, 0.95, ("base",)), "both reached; better than base"),
        "weak": (entry("text", 0.15, 0.95, ("base",)), "survival only; better than base"),
        "harsh": (entry("text", 0.05, 0.5, ("base",)), "target only; better than no baseline"),
        "near": (entry("text", 0.295, 0.8, ("base",)), "neither reached; better than no baseline"),
    }
    lines = verdict({"base": base} | {name: one for name, (one, _) in cases.items()}).splitlines()
    for name, (_, said) in cases.items():
        assert next(line for line in lines if line.startswith(f"- {name}:")).endswith(said)


def test_the_strength_is_the_one_with_the_widest_gap():
    curve = {1.0: {"target": 0.5, "others": 0.9}, 2.0: {"target": 0.1, "others": 0.8}}
    assert chosen(curve) == 2.0
