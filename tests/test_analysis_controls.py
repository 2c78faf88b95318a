"""Purity's controls: against plain loops, on planted classes, and their intervals' coverage."""

from pathlib import Path

import numpy as np
import pytest
import torch

from revelio.activations.store import ActivationStore, write_store
from revelio.analysis import controls
from revelio.analysis.config import TopImagesConfig
from revelio.analysis.paired import difference, image_subsets
from revelio.analysis.top_images import top_images
from revelio.sae.model import KSparseAutoencoder


def labelled_store(
    folder: Path, *, images: int = 300, d: int = 12, classes: int = 5, apart: float = 1.0
) -> tuple[ActivationStore, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    centers = torch.randn(classes, d, generator=draw)
    labels = torch.randint(classes, (images,), generator=draw)
    rows = torch.randn(images, d, generator=draw) + apart * centers[labels]
    names = [f"c{i}" for i in range(classes)]
    write_store(
        folder, rows, [f"i{i}" for i in range(images)], labels.tolist(), settings={"classes": names}
    )
    return ActivationStore.open(folder), centers


def knowing(centers: torch.Tensor, rows: torch.Tensor, n: int = 40, k: int = 4):
    """A k-SAE whose latents look for the classes."""
    model = KSparseAutoencoder(rows.shape[1], n, k, seed=None)
    draw = torch.Generator().manual_seed(3)
    directions = centers.repeat(n // len(centers) + 1, 1)[:n]
    directions = directions + 0.3 * torch.randn(directions.shape, generator=draw)
    with torch.no_grad():
        model.W_enc.copy_(directions / directions.norm(dim=1, keepdim=True))
        model.W_dec.copy_(model.W_enc)
        model.b_dec.copy_(rows.mean(0))
    return model


def loop_majority(top, latents, images: int, kept) -> float:
    shares = []
    for latent in latents.tolist():
        labels = [
            int(top.labels[row]) for row in top.indices[latent].tolist() if row >= 0 and kept[row]
        ][:images]
        shares.append(np.bincount(labels).max() / len(labels))
    return float(np.mean(shares))


def test_judge_equals_a_loop(tmp_path) -> None:
    store, centers = labelled_store(tmp_path / "up_ft1")
    model = knowing(centers, store.tensor())
    top = top_images(model, store, TopImagesConfig(m=30))
    latents = torch.arange(20)
    subsets = image_subsets(len(store), 0)[:5]
    found = controls.judge(top, latents, 10, subsets)
    everything = torch.ones(len(store), dtype=torch.bool)
    assert found.measures["majority"].whole == pytest.approx(
        loop_majority(top, latents, 10, everything)
    )
    for number, subset in enumerate(subsets):
        assert int(subset.sum()) == round(0.75 * len(store))
        assert float(found.measures["majority"].subsets[number]) == pytest.approx(
            loop_majority(top, latents, 10, subset)
        )


def test_controls_are_what_they_are_called(tmp_path) -> None:
    store, _ = labelled_store(tmp_path / "up_ft1")
    rows = store.tensor()
    made = controls.control_models(KSparseAutoencoder(12, 64, 4), rows)
    assert {name: model.n for name, model in made.items()} == {
        "random directions": 64, "data rows": 64, "channels": 24, "principal axes": 24,
    }  # fmt: skip
    centered = rows - rows.mean(0)
    for name, model in made.items():
        assert torch.allclose(model.W_dec.norm(dim=1), torch.ones(model.n), atol=1e-5)
        assert torch.allclose(model.b_dec, rows.mean(0), atol=1e-6)
        if name == "data rows":
            units = centered / centered.norm(dim=1, keepdim=True)
            assert ((model.W_dec @ units.T).max(1).values > 1 - 1e-5).all()
    axes = np.linalg.svd(centered.double().numpy(), full_matrices=False)[2]
    assert abs(axes[0] @ made["principal axes"].W_dec[0].detach().double().numpy()) > 1 - 1e-5


def test_a_k_sae_that_knows_the_classes_beats_every_control(tmp_path) -> None:
    store, centers = labelled_store(tmp_path / "up_ft1", images=600)
    entry = controls.compare(knowing(centers, store.tensor()), store)
    assert entry["verdict"]["majority"] == "beats every control"
    assert entry["verdict"]["entropy"] == "beats every control"
    for control in entry["controls"].values():
        low, high = control["majority"]["difference"]["interval"]
        assert 0 < low < control["majority"]["difference"]["value"] < high
    _, value = controls.strongest(entry)
    assert value == max(one["majority"]["value"] for one in entry["controls"].values())
    assert entry["values"]["majority"] > value


def test_nothing_is_told_apart_on_pure_noise(tmp_path) -> None:
    store, _ = labelled_store(tmp_path / "up_ft1", apart=0.0)
    entry = controls.compare(KSparseAutoencoder(12, 64, 4, seed=5), store)
    for measure in controls.BETTER:
        assert (
            "beats" not in entry["verdict"][measure] and "beaten" not in entry["verdict"][measure]
        )


@pytest.mark.parametrize(
    ("apart", "truth", "measured"), [(0.0, 0.0, 0.985), (0.6, 0.2412, 0.95)], ids=["null", "labels"]
)
def test_intervals_cover_the_truth(apart: float, truth: float, measured: float) -> None:
    """The share of 95 % intervals that hold the truth (the mean of 200 draws; 0 where labels say nothing)."""
    found = [_drawn_difference(seed, apart) for seed in range(1000, 1030)]
    inside = [one["interval"][0] <= truth <= one["interval"][1] for one in found]
    # Never below 95 % by more than 2 points and what 30 draws leave open.
    assert abs(np.mean(inside) - measured) <= 0.02 + 0.04
    assert np.mean([one["interval"][1] - one["interval"][0] for one in found]) < 0.2


def _drawn_difference(seed: int, apart: float) -> dict:
    from revelio.analysis.top_images import TopImages

    draw, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    centers = torch.randn(8, 12, generator=fixed)
    other = torch.randn(100, 12, generator=fixed)
    own = centers.repeat(13, 1)[:100] + 0.5 * torch.randn(100, 12, generator=fixed)
    labels = torch.randint(8, (400,), generator=draw)
    rows = torch.randn(400, 12, generator=draw) + apart * centers[labels]
    subsets = image_subsets(400, seed)
    judged = []
    for directions in (own, other):
        codes = (rows @ directions.T).clamp(min=0)
        values, indices = codes.topk(controls.SPARE * 10, dim=0)
        top = TopImages(
            values.T, torch.where(values > 0, indices, -1).T, (codes > 0).sum(0), codes.mean(0), 400,
            labels, tuple("abcdefgh"), {},
        )  # fmt: skip
        judged.append(controls.judge(top, torch.arange(100), 10, subsets))
    return difference(*(one.measures["majority"] for one in judged), 0.95)


def test_the_first_axes_have_both_signs() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    made = controls.control_models(KSparseAutoencoder(6, 6, 2), rows)["principal axes"].W_dec
    assert torch.equal(made[::2], -made[1::2]) and len(made) == 6
