"""The paper's orderings, by brute force, and what trainings and images say of them."""

import random
from itertools import product

import numpy as np
import pytest
from scipy.stats import norm

from revelio.reproduce.items import items
from revelio.reproduce.orderings import Ordering, Replicates, judge


def brute(ordering: Ordering, rows: list, values: dict) -> bool:
    """An ordering by loops over all pairs of rows that differ in its axis alone."""
    axes = ("model", "layer", "timestep", "dataset", "prompt")
    signs, ok = [], True
    for a, b in product(rows, rows):
        same = all(getattr(a, x) == getattr(b, x) for x in axes if x != ordering.axis)
        if a is b or not same:
            continue
        if ordering.kind == "rising":
            if rows.index(a) < rows.index(b):
                ok &= values[a] < values[b]
        elif getattr(a, ordering.axis) == ordering.winner:
            gap = values[a] - values[b]
            gap = -gap if ordering.kind == "least" else gap
            signs.append(gap > 0)
            ok &= gap > 0 and gap >= ordering.margin
    return any(signs) and not all(signs) if ordering.kind == "mixed" else bool(ok)


def test_orderings_against_brute_force() -> None:
    draw = random.Random(1)
    outcomes = set()
    for name, one in items().items():
        for ordering, spread in product(one.orderings, (0.1, 3.0, 30.0)):
            about = ordering.about(one.rows)
            for _ in range(10):
                values = {row: row.paper + draw.gauss(0, spread) for row in about}
                found = ordering.holds(about, np.array([[values[row] for row in about]]))[0]
                assert found == brute(ordering, about, values), (name, ordering.text)
                outcomes.add((ordering.kind, bool(found)))
                if ordering.kind == "mixed":  # a gain in every cell is not mixed
                    values = {row: 9.0 * (row.prompt == ordering.winner) for row in about}
                    found = ordering.holds(about, np.array([[values[row] for row in about]]))[0]
                    assert found == brute(ordering, about, values)
                    outcomes.add((ordering.kind, bool(found)))
    assert outcomes == set(product(("least", "most", "rising", "mixed"), (True, False)))


def test_the_probability_is_that_of_normal_means() -> None:
    a, b = items()["table2c"].rows
    ordering, draw = items()["table2c"].orderings[0], np.random.default_rng(3)
    # Many trainings: the difference is normal, with the variances of both means and the images' shifts.
    values = [draw.normal(9.0, 1.0, 40), draw.normal(9.2, 1.0, 40)]
    shift = draw.normal(0, 0.3, (2, 50))
    found = {
        row: Replicates(one, np.tile(each, (40, 1)))
        for row, one, each in zip((a, b), values, shift, strict=True)
    }
    error2 = sum(one.var(ddof=1) / 40 for one in values) + (shift[1] - shift[0]).var()
    expected = norm.cdf((values[1].mean() - values[0].mean()) / np.sqrt(error2))
    entry = judge(ordering, (a, b), found)
    assert entry["probability"] == pytest.approx(expected, abs=0.05)
    assert entry["by_chance"] == pytest.approx(0.5, abs=0.05)
    assert entry["verdict"] == "not settled" and entry["rows"] == [2, 2]
    # Far apart: settled either way, but not by one training each.
    for gap, verdict in ((1.0, "holds"), (-1.0, "does not hold")):
        far = {
            a: Replicates(values[0], found[a].shifts),
            b: Replicates(values[0] + gap, found[b].shifts),
        }
        assert judge(ordering, (a, b), far)["verdict"] == verdict
        once = {row: Replicates(one.values[:1], one.shifts[:1]) for row, one in far.items()}
        assert judge(ordering, (a, b), once)["verdict"] == "not settled"
