import json

import numpy as np
import pytest
import torch
from analysis_helpers import FakeKSAE, FakeStore, brute_force_top
from hypothesis import given, settings
from hypothesis import strategies as st

from revelio.analysis.config import TopImagesConfig
from revelio.analysis.top_images import TopImages, top_images
from revelio.analysis.top_images_files import load_top_images, save_top_images


def dense_codes(model: FakeKSAE, rows: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "dense":
        return rows.relu()
    codes = model.encode(rows)
    return torch.zeros_like(rows).scatter_(1, codes.indices, codes.values)


@st.composite
def cases(draw):
    images, n = draw(st.integers(1, 40)), draw(st.integers(1, 7))
    # Few distinct values, so that ties are the rule.
    numbers = draw(st.lists(st.integers(-2, 3), min_size=images * n, max_size=images * n))
    rows = torch.tensor(numbers, dtype=torch.float32).view(images, n)
    return rows, draw(st.integers(1, n)), draw(st.integers(1, 6))


@given(cases(), st.sampled_from(["sparse", "dense"]), st.integers(1, 50), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_equals_brute_force_with_ties_for_any_batching(case, kind, batch, chunk):
    rows, k, m = case
    model = FakeKSAE(rows.shape[1], k)
    top = top_images(
        model,
        FakeStore(rows),
        TopImagesConfig(m=m, codes=kind, batch_size=batch, latent_chunk=chunk),
    )
    codes = dense_codes(model, rows, kind)
    values, indices = brute_force_top(codes, m)
    assert top.values.tolist() == values
    assert top.indices.tolist() == indices
    counts = [sum(1 for v in codes[:, j] if v > 0) for j in range(model.n)]
    assert top.counts.tolist() == counts
    for j, count in enumerate(counts):
        mean = sum(float(v) for v in codes[:, j] if v > 0) / count if count else 0.0
        assert top.means[j] == pytest.approx(mean)


def test_density_strength_and_ranking():
    top = TopImages(
        values=torch.tensor([[1.0], [2.0], [5.0], [0.0], [2.0]]),
        indices=torch.zeros(5, 1, dtype=torch.int64),
        counts=torch.tensor([11, 12, 10, 0, 11]),
        means=torch.tensor([1.0, 2.0, 5.0, 0.0, 2.0]),
        images=40,
        labels=None,
        classes=(),
        source={},
    )
    assert top.density.tolist() == [11 / 40, 12 / 40, 10 / 40, 0, 11 / 40]
    # 10 images are not more than 10: no strength, but still ranked after the others.
    assert top.strength.tolist() == [1.0, 2.0, 0.0, 0.0, 2.0]
    assert top.ranking().tolist() == [1, 4, 0, 2]
    assert top.ranking(2).tolist() == [1, 4]


def test_grids_are_pooled():
    grids = torch.randn(12, 4, 3, 3)
    model = FakeKSAE(4, 2)
    from_grids = top_images(model, FakeStore(grids), TopImagesConfig(m=3))
    from_means = top_images(model, FakeStore(grids.mean((2, 3))), TopImagesConfig(m=3))
    assert torch.equal(from_grids.values, from_means.values)


def test_memory_is_the_state_not_the_images():
    seen = []
    store = FakeStore(torch.randn(64, 5))
    top = top_images(
        FakeKSAE(5, 2), store, TopImagesConfig(m=2, batch_size=10), progress=seen.append
    )
    assert seen == [10] * 6 + [4]
    assert top.values.shape == (5, 2)


def test_round_trip_and_what_is_wrong_is_named(tmp_path):
    labels = torch.arange(20) % 3
    top = top_images(
        FakeKSAE(6, 3), FakeStore(torch.randn(20, 6), labels, ("a", "b", "c")), TopImagesConfig(m=4)
    )
    save_top_images(top, tmp_path)
    again = load_top_images(tmp_path)
    for name in ("values", "indices", "counts", "means", "labels"):
        assert torch.equal(getattr(again, name), getattr(top, name))
    assert (again.images, again.classes, again.source) == (20, ("a", "b", "c"), top.source)
    path = tmp_path / "top_images.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match="cut or changed"):
        load_top_images(tmp_path)
    with pytest.raises(ValueError, match="no file at"):
        load_top_images(tmp_path / "nowhere")


def test_wrong_width_and_sizes_are_one_line():
    with pytest.raises(ValueError, match="5 channels and the k-SAE takes 4"):
        top_images(FakeKSAE(4, 1), FakeStore(torch.randn(3, 5)), TopImagesConfig(m=2))
    with pytest.raises(ValueError, match="m=0: give 1 or more"):
        top_images(FakeKSAE(4, 1), FakeStore(torch.randn(3, 4)), TopImagesConfig(m=0))


def test_statistics_equal_numpy_on_dense_codes(tmp_path):
    rows = torch.randn(300, 50, generator=torch.Generator().manual_seed(0))
    rows[:, :40] -= torch.linspace(0, 4, 40)
    top = top_images(
        FakeKSAE(50, 5), FakeStore(rows), TopImagesConfig(m=3, codes="dense", batch_size=70)
    )
    codes = rows.relu().numpy()
    found = top.statistics
    density = (codes > 0).mean(0)
    assert found["l0"] == pytest.approx((codes > 0).sum() / 300)
    assert 0 < found["dead_share"] == pytest.approx((density == 0).mean())
    edges = found["density"]["edges"]
    wanted, _ = np.histogram(np.log10(density[density > 0]), bins=edges)
    assert found["density"]["latents"] == wanted.tolist()
    alive = codes[:, density > 0]
    means = alive.sum(0) / (alive > 0).sum(0)
    assert found["means"] == pytest.approx(np.quantile(means, np.arange(11) / 10), rel=1e-3)
    save_top_images(top, tmp_path)
    assert json.loads((tmp_path / "top_images.json").read_text())["statistics"] == found


def test_statistics_of_latents_that_are_all_dead():
    top = top_images(FakeKSAE(4, 2), FakeStore(-torch.ones(6, 4)), TopImagesConfig(m=2))
    assert top.statistics["dead_share"] == 1
    assert top.statistics["means"] == []
    assert sum(top.statistics["density"]["latents"]) == 0
