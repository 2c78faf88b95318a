"""The advisor's race: a planted layer wins, who leaves and why, how sure the choice is."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from test_advisor import rows_of

from revelio.advisor.advice import in_words, result_of
from revelio.advisor.candidates import Candidate, cheapest_first
from revelio.advisor.config import AdviseConfig
from revelio.advisor.cost import probe_seconds, race_cost
from revelio.advisor.halving import (
    SPARED,
    WORSE,
    Round,
    contenders,
    halve,
    leaving,
    preferred,
    share_again,
    sizes,
)
from revelio.advisor.measures import Measured, nested_order, right_by_neighbors
from revelio.stats import proportion

PASSES, LAYERS, BEST, IMAGES = 9, 4, (5, 2), 400


STRENGTH = {
    (p, layer): 2.5 if (p, layer) == BEST else 0.25 + 0.08 * layer + 0.02 * p
    for p in range(PASSES)
    for layer in range(LAYERS)
}
STORE = {one: rows_of(np.arange(2000) % 3, s, 100 * one[0] + one[1]) for one, s in STRENGTH.items()}


def race(seed):
    """36 candidates of one resampling of 400 images out of 2000: one layer holds more of the classes."""
    draw = np.random.default_rng(seed)
    images = draw.permutation(2000)[:IMAGES]
    truth = np.arange(2000) % 3
    order = images[nested_order(truth[images].tolist(), IMAGES, seed)]
    asked = []

    def measured(racing, count):
        asked.append((len({one[0] for one in racing}), count))
        chosen = order[:count]
        return {
            one: Measured({"knn": right_by_neighbors(STORE[one][chosen], truth[chosen])}, {})
            for one in racing
        }

    rounds = halve(
        list(STRENGTH),
        measured,
        sizes(32, IMAGES, 4),
        by="knn",
        pass_of=lambda one: one[0],
        growth=4,
        confidence=0.95,
    )
    return rounds, asked


def test_a_planted_layer_wins_in_20_of_20_resamplings_at_a_fraction_of_the_passes():
    won = spent = 0
    for seed in range(20):
        rounds, asked = race(seed)
        last = rounds[-1]
        best = max(last.found, key=lambda one: last.found[one].value("knn"))
        won += best == BEST
        before = 0
        for passes, count in asked:
            spent += passes * (count - before)
            before = count
    assert won == 20
    assert spent / 20 < PASSES * IMAGES / 5


def test_who_leaves_and_why():
    rounds, _ = race(0)
    # The planted layer is surely better than all others at once: no further images are asked for.
    assert [one.images for one in rounds] == [32]
    assert set(rounds[0].left.values()) == {WORSE}
    assert set(rounds[0].found) - set(rounds[0].left) == {BEST}


def test_equals_race_to_the_end_and_a_later_round_keeps_one_pass():
    same = {key: Measured({"knn": np.arange(9) % 3 == 0}, {}) for key in STRENGTH}
    rounds = halve(
        list(STRENGTH),
        lambda racing, count: {one: same[one] for one in racing},
        sizes(32, IMAGES, 4),
        by="knn",
        pass_of=lambda one: one[0],
        growth=4,
        confidence=0.95,
    )
    assert [one.images for one in rounds] == [32, 128, 400] and not rounds[-1].left
    assert [len({key[0] for key in one.found}) for one in rounds] == [9, 3, 1]
    assert set(rounds[0].left.values()) == {SPARED}


def some_right(seed, **shares):
    draw = np.random.default_rng(seed)
    return {n: Measured({"knn": draw.random(50) < share}, {}) for n, share in shares.items()}


def test_contenders_are_those_whose_paired_interval_holds_zero():
    seen = 0
    for seed in range(30):
        found = some_right(seed, a=0.6, b=0.72, c=0.9, d=0.8)
        best = max(found, key=lambda one: found[one].value("knn"))
        right = {one: each.right["knn"].astype(float) for one, each in found.items()}
        expected = [
            one
            for one in found
            if one == best
            or ttest_1samp(right[best] - right[one], 0).confidence_interval(0.9).low <= 0
        ]
        assert contenders(found, "knn", 0.9) == expected
        order = preferred(found, "knn", 0.9)
        left = [one for one in order if one not in expected]
        assert order == expected + left and order[0] == expected[0]
        assert sorted(left, key=lambda one: -right[one].mean()) == left
        seen += len(expected)
    assert 30 < seen < 120
    # Equal on every image: nothing tells them apart, and the cheapest is taken.
    same = {one: Measured({"knn": np.arange(50) % 2 == 0}, {}) for one in "ab"}
    assert contenders(same, "knn", 0.95) == ["a", "b"]
    ranks = {"a": Measured({}, {"rank": 1.0}), "b": Measured({}, {"rank": 2.0})}
    assert contenders(ranks, "rank", 0.95) == ["b"]


def test_the_cheapest_pass_with_a_contender_stays():
    """Few images tell its first layer apart from the best, but not its second."""
    right = {(0, 0): 20, (0, 1): 46, (1, 0): 47, (1, 1): 50, (2, 0): 49, (2, 1): 49}
    found = {one: Measured({"knn": np.arange(60) < n}, {}) for one, n in right.items()}
    given = {"by": "knn", "pass_of": lambda one: one[0], "growth": 4, "confidence": 0.99}
    assert contenders(found, "knn", 0.99) == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    left = leaving(found, **given, first=True)
    assert left == {(0, 0): WORSE, (2, 0): SPARED, (2, 1): SPARED}
    found[0, 1] = found[0, 0]
    assert set(leaving(found, **given, first=True)) == {(0, 0), (0, 1)}
    assert set(leaving(found, **given, first=False)) == {(0, 0), (0, 1), (2, 0), (2, 1)}


def test_the_order_is_by_cost_then_prompt_then_noise():
    some = [
        Candidate("m", layer, t, p) for p in "ba" for t in (400, 25) for layer in ("deep", "up")
    ]
    order = cheapest_first(some, {one: float(one.layer == "deep") for one in some})
    assert [(one.layer, one.prompt, one.timestep) for one in order] == [
        (layer, prompt, t) for layer in ("up", "deep") for prompt in "ba" for t in (25, 400)
    ]


def test_how_sure_it_is_is_the_bootstraps_share():
    found = some_right(0, a=0.7, b=0.8, c=0.9)
    first, same, draw = preferred(found, "knn", 0.95)[0], [], np.random.default_rng(0)
    for _ in range(1500):
        some = draw.integers(0, 50, 50)
        again = {one: Measured({"knn": e.right["knn"][some]}, {}) for one, e in found.items()}
        same.append(preferred(again, "knn", 0.95)[0] == first)
    assert 0.05 < np.mean(same) < 0.95
    assert share_again(found, "knn", 0.95, 0) == pytest.approx(np.mean(same), abs=0.04)


def test_a_model_stays_with_one_pass_until_it_is_surely_worse():
    """Both passes that stay are of the first model; another model keeps one unless all it has is worse."""
    right = {("a", 0): 58, ("a", 1): 58, ("a", 2): 57, ("b", 0): 50, ("b", 1): 54, ("c", 0): 12}
    found = {one: Measured({"knn": np.arange(60) < n}, {}) for one, n in right.items()}
    given = {
        "by": "knn",
        "pass_of": lambda one: one,
        "growth": 4,
        "confidence": 0.99,
        "first": True,
    }
    alone = leaving(found, **given)
    assert alone == dict.fromkeys([("a", 2), ("b", 0), ("b", 1)], SPARED) | {("c", 0): WORSE}
    shared = leaving(found, **given, model_of=lambda one: one[0])
    # The first of the model that is a contender, as everywhere: cheap ones come first.
    stays = next(one for one in preferred(found, "knn", 0.99) if one[0] == "b")
    assert set(alone) - set(shared) == {stays} and ("c", 0) in shared
    rounds = halve(
        list(found), lambda racing, count: {one: found[one] for one in racing}, [60, 60, 60],
        by="knn", pass_of=lambda one: one, model_of=lambda one: one[0], growth=4, confidence=0.99,
    )  # fmt: skip
    assert [sorted({one[0] for one in each.found}) for each in rounds] == [
        ["a", "b", "c"],
        *2 * [["a", "b"]],
    ]


def test_the_words_name_the_models_that_left_and_why():
    one, other = (
        Candidate("near/sd", "up_ft1", 25, "empty"),
        Candidate("far/vit", "block9", None, "empty"),
    )
    later = Candidate("near/sd", "up_ft1", 100, "empty")
    found = {c: Measured({"knn": np.arange(60) < n}, {"rank": 1.0}) for c, n in
             ((one, 58), (other, 20), (later, 57))}  # fmt: skip
    rounds = [
        Round(60, found, {other: WORSE, later: SPARED}),
        Round(60, {one: found[one]}, {}),
    ]
    result = result_of(rounds, "knn", dict.fromkeys(found, 1.0), AdviseConfig())
    words = in_words(result | {"control": proportion(1, 3)})
    (gone,) = (line for line in words if line.startswith("vit left"))
    assert "after 60 images, surely worse" in gone and "(block9)" in gone and "33" in gone
    (spared,) = (line for line in words if "to spare passes" in line)
    assert spared.startswith("1 candidate left")
    assert not any(line.startswith("sd left") for line in words)


def test_a_race_costs_no_more_than_planned_and_its_first_round_as_much():
    """Races of 3 models by the plan's own seconds, summed pass by pass, stay below it; equals come near."""
    names = [Candidate(f"m{m}", f"l{layer}", t, "empty") for m, count in enumerate((4, 2, 1))
             for t in range(count) for layer in range(m + 1)]  # fmt: skip
    price = {one: 1.0 + int(one.model[1]) + int(one.layer[1]) for one in names}
    images, probes = [32, 128, 400], [0.1, 0.2, 0.3]
    plan = race_cost(price, images, 2, probes)
    spent = []
    for seed in range(12):
        draw = np.random.default_rng(seed)
        chance = {one: draw.uniform(0.5, 0.9) if seed else 1.0 for one in names}
        hits = {one: draw.random(400) < chance[one] for one in names}
        rounds = halve(
            cheapest_first(names, price),
            lambda racing, count, hits=hits: {c: Measured({"knn": hits[c][:count]}, {}) for c in racing},
            images, by="knn", pass_of=lambda one: one.model_pass, model_of=lambda one: one.model,
            growth=2, confidence=0.95,
        )  # fmt: skip
        cost, before = [], 0
        for each, probe in zip(rounds, probes, strict=False):
            passes = {one.model_pass for one in each.found}
            deepest = (max(price[c] for c in names if c.model_pass == one) for one in passes)
            cost.append((each.images - before) * sum(deepest) + len(each.found) * probe)
            before = each.images
        assert cost[0] == pytest.approx(plan.seconds[0])
        assert all(real <= most + 1e-9 for real, most in zip(cost, plan.seconds, strict=False))
        spent.append(sum(cost))
    assert max(spent) > sum(plan.seconds) / 3
    line = plan.line()
    assert line.startswith(f"plan: {len(names)} candidates, 7 passes on 32 images, then at most ")
    assert "if the first round decides" in line and "if the first" not in plan.line(begun=True)


def test_the_probes_are_timed_on_as_many_images_and_beyond_them_by_pairs(monkeypatch):
    asked = []
    monkeypatch.setattr("revelio.advisor.cost.measure", lambda rows, *_: asked.append(rows.shape))
    ticks = iter(range(6))
    monkeypatch.setattr("revelio.advisor.cost.time.perf_counter", lambda: next(ticks))
    assert probe_seconds([32, 512, 1024], 7, 2, 0) == [1.0, 1.0, 4.0]
    assert asked == [(32, 7), (512, 7), (512, 7)]
