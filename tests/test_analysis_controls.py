"""Purity's controls: against plain loops, on planted classes, and their intervals' coverage."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from revelio.activations.store import ActivationStore, write_store
from revelio.analysis import controls
from revelio.analysis.config import TopImagesConfig
from revelio.analysis.label_measures import mean_measures
from revelio.analysis.paired import (
    FREEDOM,
    ORDERS,
    SHUFFLES,
    Measured,
    difference,
    halves,
    interval,
    measured,
    shuffles,
)
from revelio.analysis.top_images import top_images
from revelio.run_dir import read_json
from revelio.sae.model import KSparseAutoencoder
from revelio.stats import t_quantile
from tools.intervals import CASES, autoencoders, drawn


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
        shares.append(np.bincount(labels).max() / len(labels) if labels else 0.0)
    return float(np.mean(shares))


def test_judge_equals_a_loop(tmp_path) -> None:
    store, centers = labelled_store(tmp_path / "up_ft1")
    model = knowing(centers, store.tensor())
    top = top_images(model, store, TopImagesConfig(m=30))
    latents = torch.arange(20)
    subsets = halves(len(store), 0)[:5]
    found = controls.judge(top, latents, 10, subsets)
    everything = torch.ones(len(store), dtype=torch.bool)
    assert found.measures["majority"].whole == pytest.approx(
        loop_majority(top, latents, 10, everything)
    )
    for number, subset in enumerate(subsets):
        assert int(subset.sum()) == len(store) // 2
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
    low, high = entry["intervals"]["majority"]
    assert low < entry["values"]["majority"] < high
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


def test_halves_are_of_one_order() -> None:
    pairs = halves(103, 0).view(ORDERS, 2, 103).int()
    assert pairs.sum(1).eq(1).all() and pairs.sum(2).eq(torch.tensor([51, 52])).all()
    assert not torch.equal(pairs[0], pairs[1])


def test_the_interval_of_a_mean_is_students() -> None:
    """Of a plain mean, V(n) is its variance: the classical interval, but for the noise of 50 orders."""
    widths = []
    for seed in range(20):
        x = torch.randn(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = measured(lambda kept, x=x: float(x[kept].mean()), halves(400, seed))
        low, high = interval(found)
        assert (low + high) / 2 == pytest.approx(float(x.mean()))
        widths.append((high - low) / 2 / t_quantile(FREEDOM) / float(x.std() / 20))
    assert 0.95 < np.mean(widths) < 1.05


def test_the_interval_is_as_its_text_says() -> None:
    subsets = torch.rand(2 * ORDERS, generator=torch.Generator().manual_seed(0)).double()
    a, b = subsets.view(ORDERS, 2).numpy().T
    half = t_quantile(FREEDOM, 0.9) * np.mean((a - b) ** 2 / 2) ** 0.5
    assert interval(Measured(2.0, subsets, steady=True), 0.9) == pytest.approx([2 - half, 2 + half])
    half /= 2**0.5
    assert interval(Measured(2.0, subsets), 0.9) == pytest.approx([2 - half, 2 + half])
    assert interval(Measured(2.0, torch.full((2 * ORDERS,), 2.0))) == [2.0, 2.0]


def test_no_interval_is_narrower_than_permuted_labels_make_it() -> None:
    draw = torch.Generator().manual_seed(0)
    near = torch.randn(2 * ORDERS, generator=draw).double()
    permuted = [scale * torch.randn(SHUFFLES, generator=draw).double() for scale in (2, 3)]
    ours, other = (Measured(value, near, True, permuted[i]) for i, value in enumerate((1.0, 0.5)))
    apart = (permuted[0] - permuted[1]).numpy()
    half = t_quantile(FREEDOM, 0.9) * apart.std(ddof=1)
    assert difference(ours, other, 0.9)["interval"] == pytest.approx([0.5 - half, 0.5 + half])
    # A floor: halves that say more are believed.
    wide = Measured(1.0, 9 * near, steady=True)
    assert interval(Measured(1.0, 9 * near, True, permuted[0])) == interval(wide)
    # A model beside itself: every order of the labels is the same for both.
    assert difference(ours, ours)["interval"] == [0.0, 0.0]


def test_the_floor_is_the_variance_over_every_permutation() -> None:
    """Sigma and pairs of two models on 6 images, against all 720 orders of their labels and plain loops."""
    labels = torch.tensor([0, 0, 1, 2, 4, 4])
    tops = torch.tensor([[0, 1, 2], [0, 1, 3]]), torch.tensor([[3, 4, 5], [2, 4, 0], [1, 5, 3]])

    def sigma(ids: np.ndarray) -> float:
        return float(ids.std(ddof=1))

    def pairs(ids: np.ndarray) -> float:
        return float(np.mean([ids[0] == ids[1], ids[0] == ids[2], ids[1] == ids[2]]))

    def gap(form, order: np.ndarray) -> float:
        ours, other = (np.mean([form(order[row]) for row in top.numpy()]) for top in tops)
        return float(ours - other)

    forms = {"sigma": sigma, "pairs": pairs}
    claimed = {name: [] for name in forms}
    for seed in range(12):
        orders = shuffles(labels, seed)
        ours, other = (
            mean_measures(top, labels, 5, 3, torch.ones(2, 6).bool(), orders, list(forms))
            for top in tops
        )
        for name, form in forms.items():
            mine, its = ours[name].shuffled, other[name].shuffled
            assert mine is not None and its is not None
            if not seed:
                each = [gap(form, order) for order in orders.numpy()]
                assert (mine - its).tolist() == pytest.approx(each)
            claimed[name].append(float((mine - its).var()))
    for name, form in forms.items():
        exact = np.var([gap(form, np.array(order)) for order in permutations(labels.tolist())])
        assert np.mean(claimed[name]) == pytest.approx(exact, rel=0.08), name


def test_no_interval_leaves_the_range_of_its_measure() -> None:
    noise = torch.randn(2 * ORDERS, generator=torch.Generator().manual_seed(0)).double()
    near = {"sigma": 0.1, "majority": 0.98, "entropy": 0.02, "pairs": 0.99}
    judged = controls.Judged(9, {name: Measured(value, noise) for name, value in near.items()})
    found = controls._entry(judged, {"random directions": judged}, 0.95)["intervals"]
    free = {name: interval(one) for name, one in judged.measures.items()}
    assert all(low < 0 and high > 1 for low, high in free.values())
    assert found == {
        "sigma": [0, free["sigma"][1]], "majority": [0, 1], "entropy": [0, 1], "pairs": [0, 1],
    }  # fmt: skip


@pytest.mark.parametrize("case", ["null", "labels"])
def test_intervals_cover_the_truth(case: str) -> None:
    """The coverage simulation of `tools/intervals.py` in small form; the truths are its draws' means."""
    models, names = autoencoders(CASES[case]), ("purity", "probe 5")
    found = [drawn(seed, CASES[case], models, names) for seed in range(1000, 1012)]
    truths = read_json(Path(__file__).parents[1] / "docs/intervals.json")["cases"][case]
    for name in names:
        inside = [one[name][1] <= truths[name]["truth"] <= one[name][2] for one in found]
        assert sum(inside) >= 10, name  # of 12: fewer have a chance of 2 %
