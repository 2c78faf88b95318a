"""Measures of a k-SAE and their controls: against loops, closed forms, and what is known to be so."""

from itertools import permutations
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_helpers import classes_in_channels, judged, reading
from sae_helpers import loop_decode, loop_encode, planted, random_model
from scipy import stats
from torch.nn.functional import cosine_similarity

from revelio.analysis.paired import halves
from revelio.evaluation.controls import TRAINED, control_dictionaries, trained_control
from revelio.evaluation.encoded import encoded
from revelio.evaluation.identity import (
    distinct_directions,
    matched_cosines,
    planted_recovery,
    planted_rows,
    planted_verdicts,
    stability,
    stability_verdicts,
)
from revelio.evaluation.judge import judge
from revelio.evaluation.measures import _best_threshold, cosine, distinct, held_out
from revelio.sae.config import RunConfig, TrainConfig
from revelio.sae.inputs import measure
from revelio.sae.model import KSparseAutoencoder


def test_reconstruction_equals_loops() -> None:
    model = random_model()
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(4))
    _, found = judged(model, rows, None)
    made, x = loop_decode(model, loop_encode(model, rows)), rows.double().numpy()
    assert found["fvu"].whole == pytest.approx(
        ((made - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4
    )
    a, b = made - x.mean(0), x - x.mean(0)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert found["cosine"].whole == pytest.approx(cosines.mean(), rel=1e-4)
    assert set(found) == {"fvu", "cosine"}  # no labels: nothing of meaning


@pytest.mark.parametrize("cells", [0, 3])
def test_cosine_of_some_images_is_about_their_own_mean(cells: int) -> None:
    draw = torch.Generator().manual_seed(5)
    rows = torch.randn((300, cells, 6) if cells else (300, 6), generator=draw)
    model, half = random_model(), torch.arange(300) < 150
    x = rows[half].flatten(0, -2)
    made = model.decode(model.encode(x)).detach()
    a, b = made - x.mean(0), x - x.mean(0)
    exact = float(torch.nn.functional.cosine_similarity(a, b).mean())
    codes = encoded(model, rows)
    found = cosine(codes, held_out(rows, None, half[None], 0)).subsets[0]
    assert found == pytest.approx(exact, abs=2e-3)
    # About the mean of all images it would be another number.
    assert abs(float(codes.cosines[half].mean()) - exact) > 5e-3


def test_latents_that_are_the_classes_score_one() -> None:
    rows, labels = classes_in_channels()
    _, found = judged(reading(8, 8, 1), rows, labels)
    for name in ("purity", "probe 1", "probe 5", "coverage 0.5", "coverage 0.8", "significant"):
        assert found[name].whole == 1.0, name
        assert torch.all(found[name].subsets == 1.0), name


@pytest.mark.parametrize("count", [11, 12, 16, 19, 20, 21, 22, 23])
def test_few_images_leave_out_what_needs_more(count: int) -> None:
    labels = torch.arange(count) % 2
    rows = torch.rand(count, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    rows[:, 0] += 5 * labels
    model = reading(4, 4, 4)
    found = judge({"ours": model, "control": random_model(4, 4, 4)}, rows, labels)
    # In a half of 10 images each latent's top images are all of them: there is nothing to tell apart.
    assert ("significant" in found["not_measured"]) == (count // 2 <= 10)
    codes, measures = judged(model, rows, labels)
    if "significant" in measures:
        order = [codes.top(latent)[0][:10] for latent in range(4)]
        tails = [
            min(
                1.0,
                2 * min(_tail(int((labels[top] == one).sum()), labels == one) for one in (0, 1)),
            )
            for top in order
        ]
        kept = np.mean(stats.false_discovery_control(tails) <= 0.05)
        assert measures["significant"].whole == pytest.approx(kept)


def _tail(hits: int, members: torch.Tensor) -> float:
    """The chance that 10 of the images hold so many members or more, by counting."""
    total, size = len(members), int(members.sum())
    ways = [comb(size, i) * comb(total - size, 10 - i) for i in range(hits, 11) if i <= size]
    return sum(ways) / comb(total, 10)


def test_latents_of_noise_score_chance() -> None:
    rows = torch.rand(2000, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(2000) % 4
    _, found = judged(reading(8, 8, 2), rows, labels)
    assert abs(found["probe 1"].whole - 0.5) < 0.04
    assert abs(found["probe 20"].whole - 0.5) < 0.04
    assert found["coverage 0.5"].whole == 0.0
    assert found["significant"].whole <= 1 / 8


def test_purity_equals_a_loop_on_all_images_and_on_subsets() -> None:
    rows = torch.randn(300, 12, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(3))
    model = random_model(12, 20, 3)
    codes, found = judged(model, rows, labels)
    dense = codes.matrix.toarray()
    fires = [j for j in range(20) if (dense[:, j] > 0).sum() > 10]
    subsets, values = halves(300, 0)[:12], found["purity"].subsets[:12].tolist()
    for kept, value in zip(
        (torch.ones(300).bool(), *subsets), (found["purity"].whole, *values), strict=True
    ):
        shares = []
        for j in fires:
            order = sorted(range(300), key=lambda i: (-dense[i, j], i))
            # The first 30 of the whole set are kept, so that others move up.
            top = [i for i in order if dense[i, j] > 0][:30]
            names = [int(labels[i]) for i in top if kept[i]][:10]
            shares.append(max(np.bincount(names)) / len(names) if names else 0.0)
        assert value == pytest.approx(np.mean(shares))


def test_the_other_forms_of_purity_equal_a_loop() -> None:
    rows = torch.randn(300, 12, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(3))
    codes, found = judged(random_model(12, 20, 3), rows, labels)
    each = []
    for j in codes.strongest(1000, 11).tolist():
        names = labels[codes.top(j)[0][:10]].numpy()
        shares = np.bincount(names) / 10
        bits = -sum(s * np.log2(s) for s in shares if s) / np.log2(5)
        same = sum(a == b for i, a in enumerate(names) for b in names[:i]) / 45
        each.append((names.std(ddof=1), bits, same))
    wanted = np.mean(each, axis=0)
    for name, value in zip(("sigma_label", "entropy", "same-class pairs"), wanted, strict=True):
        assert found[name].whole == pytest.approx(value), name


def test_near_duplicates_count_once() -> None:
    rows, _ = classes_in_channels()
    model = reading(8, 8, 2)
    with torch.no_grad():
        model.W_dec[1] = model.W_dec[0] + 0.1 * model.W_dec[1]
    codes = encoded(model, rows)
    latents = codes.strongest(1000, 11)
    kept = distinct(codes, latents).tolist()
    assert (0 in kept) != (1 in kept) and len(kept) == len(latents) - 1


def test_the_threshold_of_highest_f1_is_brute_forces() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = np.maximum(rng.normal(size=12).round(1), 0)
        positive = rng.random(12) < 0.4
        best = 0.0
        for threshold in values[values > 0]:
            fires = values >= threshold
            best = max(best, 2 * (fires & positive).sum() / (fires.sum() + positive.sum()))
        found, threshold = _best_threshold(values, positive)
        if (values > 0).any():
            fires = values >= threshold
            assert found == pytest.approx(best)
            assert 2 * (fires & positive).sum() / (fires.sum() + positive.sum()) == pytest.approx(
                best
            )


def test_matching_is_the_best_of_all_permutations() -> None:
    draw = torch.Generator().manual_seed(5)
    a, b = torch.randn(5, 4, generator=draw), torch.randn(5, 4, generator=draw)
    cosines = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
    best = max(permutations(range(5)), key=lambda p: sum(float(cosines[i, p[i]]) for i in range(5)))
    assert matched_cosines(a, b).tolist() == pytest.approx(
        [float(cosines[i, best[i]]) for i in range(5)]
    )
    assert matched_cosines(a, a[torch.tensor([3, 1, 4, 0, 2])]).min() > 1 - 1e-6
    assert matched_cosines(a, b[:2]).eq(-1).sum() == 3


def test_stability_of_the_same_and_of_unrelated_directions() -> None:
    draw = torch.Generator().manual_seed(6)
    a, b = torch.randn(40, 64, generator=draw), torch.randn(40, 64, generator=draw)
    assert stability([a, 3 * a.flip(0)])["0.9"]["value"] == 1.0
    assert stability([a, b])["0.7"]["value"] == 0.0


def test_directions_that_repeat_each_other_are_stable_whatever_the_seed_and_distinct_ones_are_not() -> (
    None
):
    # Two runs of 40 directions within a narrow cone, and of 5 orthogonal ones: only those are stable.
    seed = torch.Generator().manual_seed(0)
    runs = []
    for _ in range(2):
        cone = torch.zeros(40, 64)
        cone[:, 0] = 1.0
        cone += 0.06 * torch.randn(40, 64, generator=seed)
        runs.append(torch.cat([torch.eye(64)[1:6], cone]))
    plain, once = stability(runs), stability(runs, distinct_only=True)
    assert plain["0.7"]["value"] == 1.0
    # By brute force: the first of each group of directions above the level.
    for level in (0.7, 0.9):
        found = []
        for one in runs:
            kept: list[int] = []
            for place, row in enumerate(one):
                if all(float(cosine_similarity(row, one[k], dim=0)) <= level for k in kept):
                    kept.append(place)
            found.append(one[kept])
            assert torch.equal(distinct_directions(one, level), one[kept])
        shares = [
            float((matched_cosines(a, b) > level).double().mean()) for a, b in (found, found[::-1])
        ]
        assert once[str(level)]["pairs"] == pytest.approx(shares)
        assert once[str(level)]["latents"] == min(map(len, found))
    assert once["0.7"]["latents"] < 10


def test_stability_is_told_apart_only_from_controls_with_a_seed() -> None:
    def shares(*pairs: float) -> dict[str, Any]:
        both = [share for share in pairs for _ in range(2)]
        return {level: {"value": sum(pairs) / 3, "pairs": both} for level in ("0.7", "0.9")}

    found = {
        "k-SAE": shares(0.8, 0.82, 0.84),
        "data rows": shares(0.2, 0.22, 0.24),
        "channels": shares(1, 1, 1),
    }
    entry = stability_verdicts(found)["0.7"]
    assert set(entry["differences"]) == {"data rows"} and entry["verdict"] == "beats every control"
    # Trainings (1, 2, 3) leave one pair each: 0.84, 0.82, 0.8.
    error2 = 2 / 3 * (0.02**2 + 0.02**2)
    half = stats.t.ppf(0.975, 4) * (2 * error2) ** 0.5  # Welch: twice 2 degrees of freedom
    assert entry["differences"]["data rows"]["interval"] == pytest.approx([0.6 - half, 0.6 + half])


def test_planted_recovery_is_compared_on_the_same_rows() -> None:
    found = {
        "k-SAE": {level: {"trainings": [0.9, 0.95, 1.0]} for level in ("0.7", "0.9")},
        "k-means": {level: {"trainings": [0.8, 0.84, 0.91]} for level in ("0.7", "0.9")},
        "data rows": {level: {"trainings": [0.9, 0.99, 0.95]} for level in ("0.7", "0.9")},
    }
    entry = planted_verdicts(found)["0.9"]
    gaps = np.array([0.1, 0.11, 0.09])
    half = stats.t.ppf(1 - 0.0125, 2) * gaps.std(ddof=1) / 3**0.5
    low, high = entry["differences"]["k-means"]["interval"]
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half))
    assert entry["verdict"] == "not told apart from data rows"


def test_planted_directions_that_are_given_are_found() -> None:
    rows, truth = planted_rows(16, 24, 2, 500, seed=0)
    signs = rows @ torch.linalg.pinv(truth)  # least squares: few codes are large
    assert signs.shape == (500, 24)
    assert matched_cosines(truth, truth.flip(0)).min() > 1 - 1e-6
    config = RunConfig(
        k=2, expansion=4, steps=400, batch_size=256, learning_rate=3e-3, warmup_steps=10
    )
    found = planted_recovery(config, 16, 4000, directions=24)
    assert found["k-SAE"]["0.9"] > 0.6 > found["random directions"]["0.9"]
    assert found["random directions"]["0.9"] < 0.1


def test_trained_controls_keep_what_is_frozen() -> None:
    rows, _ = planted(400, 12, 30, 3)
    model = KSparseAutoencoder(12, 48, 3)
    config = TrainConfig(steps=30, batch_size=100, learning_rate=1e-2, warmup_steps=1)
    start = {
        name: trained_control(
            name, model, rows, TrainConfig(steps=1, batch_size=100, learning_rate=1e-9)
        )
        for name in TRAINED
    }
    made = {name: trained_control(name, model, rows, config) for name in TRAINED}

    def moved(name: str, weight: str) -> float:
        a, b = (getattr(one[name], weight).data for one in (start, made))
        return float(torch.nn.functional.cosine_similarity(a, b).min())

    assert moved("frozen decoder", "W_dec") > 1 - 1e-6 > moved("frozen decoder", "W_enc")
    assert moved("frozen encoder", "W_enc") > 1 - 1e-6 > moved("frozen encoder", "W_dec")
    assert 0.8 - 1e-5 < moved("soft-frozen", "W_dec") < 1 - 1e-4
    assert moved("shuffled", "W_dec") < 0.99
    with pytest.raises(ValueError, match="unknown control 'icy'"):
        trained_control("icy", model, rows, config)


@pytest.mark.parametrize("kind", ["per-dimension", "mean-norm"])
def test_controls_of_a_k_sae_that_normalizes_are_those_of_the_normalized_activations(
    kind: Any,
) -> None:
    rows = planted(400, 12, 30, 3)[0]
    rows[:, :3] *= 300  # loud channels
    x = rows.double().numpy()
    if kind == "per-dimension":
        by_hand = (x - x.mean(0)) / x.std(0)
    else:
        by_hand = x / np.linalg.norm(x, axis=1).mean() * 12**0.5
    by_hand = torch.from_numpy(by_hand).float()
    model = KSparseAutoencoder(12, 48, 3, inputs=[measure({"layer": "a"}, kind, [rows])])
    plain, about = KSparseAutoencoder(12, 48, 3), {"layer": "a"}
    config = TrainConfig(steps=20, batch_size=100, learning_rate=1e-2, warmup_steps=1)
    pairs = {
        name: (
            trained_control(name, model, rows, config, source=about),
            trained_control(name, plain, by_hand, config),
        )
        for name in TRAINED
    }
    made = control_dictionaries(model, rows, source=about)
    alike = control_dictionaries(plain, by_hand)
    pairs |= {name: (made[name], alike[name]) for name in made if name != "independent axes"}
    for name, (ours, expected) in pairs.items():
        cosines = torch.nn.functional.cosine_similarity(ours.W_dec, expected.W_dec)
        assert cosines.abs().median() > 1 - 1e-3, name
        codes, wanted = encoded(ours, rows, about), encoded(expected, by_hand)
        assert codes.firings.float().mean() == pytest.approx(
            float(wanted.firings.float().mean()), rel=0.02
        )
    # Of random weights the scale is their own.
    quiet = trained_control("random weights", model, rows / 1000, config, source=about)
    loud = trained_control("random weights", model, rows, config, source=about)
    assert torch.allclose(quiet.W_dec, loud.W_dec, atol=1e-3)


def test_axes_that_are_independent_are_found() -> None:
    draw = torch.Generator().manual_seed(8)
    sources = torch.empty(2000, 4).exponential_(generator=draw)
    mixing = torch.randn(4, 4, generator=draw)
    rows = sources @ mixing
    control = control_dictionaries(KSparseAutoencoder(4, 32, 2), rows)["independent axes"]
    # ICA's components unmix: each is a row of the inverse of the mixing.
    unmixing = torch.linalg.inv(mixing).T
    assert matched_cosines(unmixing, control.W_dec.data).min() > 0.99
