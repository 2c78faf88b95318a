import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from analysis_helpers import FakeKSAE, FakeStore

from revelio.analysis.config import PurityConfig, TopImagesConfig
from revelio.analysis.label_measures import (
    bootstrap_intervals,
    chance,
    class_counts,
    measures,
    permutation_null,
)
from revelio.analysis.purity import latent_measures, purity, table
from revelio.analysis.similarity import chance_similarity, pair_similarity, unit_vectors
from revelio.analysis.top_images import top_images

FEW = PurityConfig(random_sets=50, permutations=5, bootstrap=5)


@pytest.fixture(scope="module")
def top():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(300) % 6
    # Latent j likes class j % 6, so that there is something to measure.
    rows = torch.rand(300, 24, generator=generator) + 0.03 * (
        labels[:, None] == torch.arange(24) % 6
    )
    store = FakeStore(rows, labels, tuple("abcdef"))
    return top_images(FakeKSAE(24, 5), store, TopImagesConfig(m=12))


def test_measures_equal_plain_loops():
    rows = [[0, 0, 3, 1], [5, 5, 5, 5], [0, 1, 2, 3], [4, 4, 2, 2]]
    found = measures(class_counts(torch.tensor(rows), 6))
    for i, row in enumerate(rows):
        shares = [row.count(c) / 4 for c in set(row)]
        same = [a == b for x, a in enumerate(row) for b in row[x + 1 :]]
        assert found["sigma"][i] == pytest.approx(statistics.stdev(row))
        assert found["majority"][i] == max(shares)
        bits = -sum(p * math.log2(p) for p in shares)
        assert found["entropy"][i] == pytest.approx(bits / math.log2(4))
        assert found["pairs"][i] == pytest.approx(sum(same) / len(same))


def test_sigma_label_equals_a_loop_over_the_strongest(top):
    entry = purity(top, PurityConfig(latents=7, random_sets=100, permutations=20, bootstrap=20))
    strength = [float(m) * (int(c) > 10) for m, c in zip(top.means, top.counts, strict=True)]
    order = sorted(range(24), key=lambda j: -strength[j])[:7]
    sigmas = [statistics.stdev(top.labels[top.indices[j, :10]].tolist()) for j in order]
    assert entry["sigma_label"] == pytest.approx(statistics.mean(sigmas))
    assert entry["latents"] == 7
    assert entry["interval"][0] <= entry["sigma_label"] <= entry["interval"][1]


def test_series_is_the_mean_of_the_first_hundreds():
    store = FakeStore(torch.rand(60, 250), torch.arange(60) % 5, tuple("abcde"))
    found = top_images(FakeKSAE(250, 120), store)
    entry = purity(found, replace(FEW, latents=230))
    assert list(entry["series"]) == ["100", "200"]
    shorter = purity(found, replace(FEW, latents=200))
    assert entry["series"]["200"] == pytest.approx(shorter["sigma_label"])


@pytest.mark.parametrize(("classes", "low", "high"), [(37, 10.50, 10.56), (102, 28.9, 29.4)])
def test_chance_of_balanced_classes(classes, low, high):
    labels = torch.arange(classes * 100) % classes
    mean, deviation = chance(labels, classes, images=10, draws=40_000, seed=0)["sigma"]
    assert low < mean < high
    assert 0 < deviation < mean


def test_chance_equals_simulation_on_skewed_labels():
    labels = torch.tensor([0] * 50 + [1] * 5 + [7] * 20)
    rng = np.random.default_rng(1)
    drawn = [rng.choice(labels.numpy(), 6, replace=False) for _ in range(4000)]
    simulated = {
        "sigma": np.mean([np.std(row, ddof=1) for row in drawn]),
        "majority": np.mean([np.bincount(row).max() / 6 for row in drawn]),
        "pairs": np.mean([(np.sum(row[:, None] == row) - 6) / 30 for row in drawn]),
    }
    found = chance(labels, 8, images=6, draws=20_000, seed=0)
    for name, value in simulated.items():
        assert found[name][0] == pytest.approx(value, rel=0.02)


def test_order_free_measures_survive_renumbering_and_sigma_does_not(top):
    renumbered = replace(top, labels=torch.tensor([3, 0, 5, 1, 4, 2])[top.labels])
    few = PurityConfig(random_sets=200, permutations=30, bootstrap=30)
    before, after = purity(top, few), purity(renumbered, few)
    for name in ("majority_share", "entropy", "same_class_pairs", "null_z", "null_p"):
        assert before[name] == pytest.approx(after[name])
    assert abs(before["sigma_label"] - after["sigma_label"]) > 0.01


def test_null_z_is_near_zero_for_random_labels_and_large_for_pure_latents():
    rng = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(200, generator=rng)[:10] for _ in range(50)])
    labels = torch.arange(200) % 8
    z, p, null = permutation_null(labels, rows, permutations=300, seed=0)
    assert abs(z) < 3.5
    assert null == pytest.approx((200 / 8 - 1) / 199, abs=0.01)
    pure = torch.arange(0, 200, 8)[:10].expand(50, 10)
    z, p, _ = permutation_null(labels, pure, permutations=300, seed=0)
    assert z > 5
    assert p == pytest.approx(1 / 301)


def test_bootstrap_interval_matches_the_normal_one_and_covers():
    values = torch.randn(400, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    low, high = bootstrap_intervals({"x": values}, samples=4000, seed=0)["x"]
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.012)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.012)


def test_no_labels_leave_out_label_measures_and_say_so(top):
    entry = purity(replace(top, labels=None, classes=()), PurityConfig(latents=5))
    assert entry["sigma_label"] is None
    assert "majority_share" not in entry
    assert any("no labels" in note for note in entry["notes"])


def test_fewer_latents_than_wanted_are_counted(top):
    entry = purity(top, FEW)
    assert entry["latents"] == entry["eligible"] == 24
    assert any("only 24 latents" in note for note in entry["notes"])


def test_too_few_images_give_no_number_but_a_note():
    found = top_images(FakeKSAE(4, 2), FakeStore(torch.rand(6, 4), torch.arange(6) % 2, ("a", "b")))
    entry = purity(found)
    assert (entry["sigma_label"], entry["latents"]) == (None, 0)
    json.dumps(entry, allow_nan=False)
    per_latent = latent_measures(found, found.ranking(), 10)
    assert not per_latent["majority"].isnan().any()


def test_images_beyond_m_are_refused(top):
    with pytest.raises(ValueError, match=r"give 2\.\.12"):
        purity(top, PurityConfig(m=20))


def test_entries_are_json_and_the_table_shows_them(top):
    entry = purity(top, FEW)
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    lines = table([entry]).splitlines()
    assert lines[0].split()[:3] == ["latents", "sigma_label", "chance"]
    assert f"{entry['sigma_label']:.3f}" in lines[1]


def test_similarity_equals_loops_and_chance_is_exact():
    store = FakeStore(torch.randn(15, 4) + 2)
    units = unit_vectors(store, store.ids, centre=False)
    rows = torch.tensor([[0, 4, 7], [1, 2, 14]])
    codes = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    plain, weighted = pair_similarity(units, rows, codes)
    cosine = torch.nn.functional.cosine_similarity
    raw = torch.cat([r for _, r in store.batches(15)])
    for i in range(2):
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosines = [float(cosine(raw[rows[i, a]], raw[rows[i, b]], dim=0)) for a, b in pairs]
        weights = [float(codes[i, a] * codes[i, b]) for a, b in pairs]
        assert plain[i] == pytest.approx(statistics.mean(cosines), abs=1e-5)
        expected = sum(c * w for c, w in zip(cosines, weights, strict=True)) / sum(weights)
        assert weighted[i] == pytest.approx(expected, abs=1e-5)
    everything = [cosine(raw[a], raw[b], dim=0) for a in range(15) for b in range(a)]
    assert chance_similarity(units) == pytest.approx(
        float(torch.stack(everything).mean()), abs=1e-5
    )


def test_embeddings_are_matched_by_id():
    rows = torch.randn(5, 3)
    ids = [f"image{i}" for i in (4, 2, 0, 1, 3)]
    shuffled = FakeStore(rows[[4, 2, 0, 1, 3]], ids=ids)
    plain = FakeStore(rows)
    found = unit_vectors(shuffled, plain.ids, centre=True)
    assert torch.allclose(found, unit_vectors(plain, plain.ids, centre=True), atol=1e-6)
    with pytest.raises(ValueError, match="lacks 1 of the images, first other"):
        unit_vectors(plain, ["image1", "other"], centre=False)
