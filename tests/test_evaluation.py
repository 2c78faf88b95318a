"""Measures of a k-SAE and their controls: against loops, closed forms, and what is known to be so."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones_helpers import picture, tiny_clip, tiny_dinov2, tiny_dit, tiny_sd
from sae_helpers import loop_decode, loop_encode, planted, random_model
from scipy import stats

from revelio.activations.config import ExtractRunConfig
from revelio.activations.store import ActivationStore, write_store
from revelio.analysis.paired import against, halves
from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import load_backbone
from revelio.data.config import DataConfig
from revelio.evaluation.ablation import ablations
from revelio.evaluation.card import END, START
from revelio.evaluation.config import EvalSAEConfig
from revelio.evaluation.controls import TRAINED, trained_control, untrained_controls
from revelio.evaluation.downstream import Denoised, Downstream, Embedded, Reader, replaced, without
from revelio.evaluation.encoded import encoded
from revelio.evaluation.identity import (
    matched_cosines,
    planted_recovery,
    planted_rows,
    planted_verdicts,
    stability,
    stability_verdicts,
)
from revelio.evaluation.judge import measures_of, over_trainings
from revelio.evaluation.loss_recovered import loss_recovered, reconstruction
from revelio.evaluation.measures import (
    _best_threshold,
    distinct,
    held_out,
)
from revelio.pipelines.eval_sae import NO_TRAIN_STORE, NOT_IN_MODEL, UNLABELLED, eval_sae
from revelio.pipelines.extract import extract_to
from revelio.pipelines.train_sae import train_sae
from revelio.sae.config import RunConfig, TrainConfig, TrainSAEConfig
from revelio.sae.model import KSparseAutoencoder


def reading(d: int, n: int, k: int) -> KSparseAutoencoder:
    """Latent j reads channel j and writes it back."""
    model = KSparseAutoencoder(d, n, k, seed=None)
    with torch.no_grad():
        model.W_enc.copy_(torch.eye(n, d))
        model.W_dec.copy_(torch.eye(n, d))
    return model


def classes_in_channels(images: int = 400, d: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel c is large on images of class c, for the first four channels; the rest is noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 4
    rows = 0.1 * torch.rand(images, d, generator=draw)
    rows[torch.arange(images), labels] += 1 + torch.rand(images, generator=draw)
    return rows, labels


def judged(model: KSparseAutoencoder, rows: torch.Tensor, labels: torch.Tensor | None):
    codes = encoded(model, rows)
    return codes, measures_of(codes, held_out(rows, labels, halves(len(rows), 0), 0))


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


def test_latents_that_are_the_classes_score_one() -> None:
    rows, labels = classes_in_channels()
    _, found = judged(reading(8, 8, 1), rows, labels)
    for name in ("purity", "probe 1", "probe 5", "coverage 0.5", "coverage 0.8", "significant"):
        assert found[name].whole == 1.0, name
        assert torch.all(found[name].subsets == 1.0), name


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


def test_axes_that_are_independent_are_found() -> None:
    draw = torch.Generator().manual_seed(8)
    sources = torch.empty(2000, 4).exponential_(generator=draw)
    mixing = torch.randn(4, 4, generator=draw)
    rows = sources @ mixing
    control = untrained_controls(KSparseAutoencoder(4, 32, 2), rows)["independent axes"]
    # ICA's components unmix: each is a row of the inverse of the mixing.
    unmixing = torch.linalg.inv(mixing).T
    assert matched_cosines(unmixing, control.W_dec.data).min() > 0.99


def _in_model(folder: Path, kind: str):
    """A tiny model with six pictures at its input, and the width of the layer that is changed."""
    make = {"diffusion": tiny_sd, "dit": tiny_dit, "clip": tiny_clip, "dinov2": tiny_dinov2}[kind]
    backbone = load_backbone(str(make(folder)), device="cpu")
    pixels = backbone.encode(torch.stack([backbone.transform(picture(i)) for i in range(6)]))
    layer = "up_ft0" if kind == "diffusion" else "block1"
    if kind in ("clip", "dinov2"):
        made = Embedded(backbone, layer, pixels, batch_size=4)
    else:
        made = Denoised(backbone, layer, pixels, list("abcdef"), 200, batch_size=4)
    return made, backbone.layers[layer].channels


@pytest.mark.parametrize("kind", ["diffusion", "dit", "clip", "dinov2"])
def test_loss_recovered_is_one_for_the_identity_and_zero_for_the_mean(
    tmp_path: Path, kind: str
) -> None:
    downstream, d = _in_model(tmp_path / "model", kind)
    mean = torch.randn(d, generator=torch.Generator().manual_seed(0))
    ways = {
        "true": None,
        "mean": lambda rows: mean.expand_as(rows),
        "zero": torch.zeros_like,
        "same": lambda rows: rows,
        "k-SAE": reconstruction(KSparseAutoencoder(d, 4 * d, 4)),
    }
    for cells in (False, True):
        losses = {
            name: downstream.losses(downstream.outputs(replaced(way, cells)))
            for name, way in ways.items()
        }
        subsets = halves(6, 0)
        assert loss_recovered(losses, "same", subsets).whole == pytest.approx(1.0, abs=1e-3)
        assert loss_recovered(losses, "mean", subsets).whole == 0.0
        assert (
            len(
                {round(float(losses[name].mean()), 9) for name in ("true", "mean", "zero", "k-SAE")}
            )
            == 4
        )


def test_losses_are_the_models_own(tmp_path: Path) -> None:
    """Against a plain forward hook, and against plain passes."""
    downstream, d = _in_model(tmp_path / "sd", "diffusion")
    vector = torch.randn(d, generator=torch.Generator().manual_seed(1))
    module = downstream.backbone.module("up_ft0")
    handle = module.register_forward_hook(lambda *a: a[2] - vector[:, None, None])
    with torch.no_grad():
        text = downstream.model.conditioning([""] * 6)
        plain = downstream.model.predict(downstream.x_t, 200, text)
    handle.remove()
    found = downstream.outputs(without(vector.expand(6, -1)))
    torch.testing.assert_close(found, plain)
    losses = ((plain - downstream.target) ** 2).mean((1, 2, 3)).double()
    torch.testing.assert_close(downstream.losses(found), losses)
    # Of images given twice and out of order, those of one pass.
    images = torch.tensor([3, 0, 3])
    some = downstream.outputs(without(vector.expand(3, -1)), images)
    torch.testing.assert_close(some, plain[images])

    downstream, d = _in_model(tmp_path / "dinov2", "dinov2")
    vector = torch.randn(d, generator=torch.Generator().manual_seed(2))

    def hook(_module, _inputs, output):
        tokens = output[0] if isinstance(output, tuple) else output
        changed = torch.cat([tokens[:, :1], tokens[:, 1:] - vector], 1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    model = downstream.model.model
    with torch.no_grad():
        before = model(downstream.encoded)
        handle = downstream.backbone.module("block1").register_forward_hook(hook)
        after = model(downstream.encoded)
        handle.remove()
    parts = [(one.pooler_output, one.last_hidden_state[:, 1:].mean(1)) for one in (before, after)]
    cosines = [torch.cosine_similarity(a, b).double() for a, b in zip(*parts, strict=True)]
    losses = downstream.losses(downstream.outputs(without(vector.expand(6, -1))))
    torch.testing.assert_close(losses, 1 - sum(cosines) / 2, atol=1e-6, rtol=1e-4)


class Channels(Downstream):
    """A model that gives its input's first two cells' mean, channel by channel, and reads nothing else."""

    def run(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone.module("x")(self.encoded[images]).mean(1)[:, :4]

    def losses(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.square().sum(1)

    def features(self, outputs: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return outputs


class Passing:
    """One layer, `x`, that passes cells on."""

    def __init__(self) -> None:
        self.layer = torch.nn.Identity()

    def module(self, layer: str) -> torch.nn.Module:
        return self.layer


def _ablated(model: KSparseAutoencoder):
    rows, labels = classes_in_channels()
    cells = rows[:, None].expand(-1, 3, -1)
    images = held_out(rows, labels, halves(len(rows), 0), 0)
    downstream = Channels(Passing(), "x", cells, batch_size=64)
    reader = Reader.of(downstream, images)
    assert reader is not None
    codes = {"k-SAE": encoded(model, rows), "random": encoded(KSparseAutoencoder(8, 8, 1), rows)}
    return ablations(downstream, codes, images, reader), downstream, images, reader, rows


def test_ablating_the_latents_of_the_classes_takes_them_and_nothing_else() -> None:
    (entries, parts), _, images, reader, rows = _ablated(reading(8, 8, 1))
    assert entries["ablation"]["verdict"] == "beats every control"
    assert set(entries["ablation"]["controls"]) == {
        "random", "a random direction", "another latent of equal mass",
    }  # fmt: skip
    # The latent of class c is channel c: a loop over classes and judged images, without hooks.
    own = []
    for c in range(4):
        drops = []
        for i in (images.judged & (images.labels == c)).nonzero()[:, 0].tolist():
            x = rows[i].clone()
            before = reader.fitted.predict_log_proba(x[None, :4].double().numpy())[0, c]
            if int(rows[i].argmax()) == c:
                x[c] = 0
            drops.append(
                before - reader.fitted.predict_log_proba(x[None, :4].double().numpy())[0, c]
            )
        own.append(np.mean(drops))
    assert parts["k-SAE"]["own"] == pytest.approx(np.mean(own), rel=1e-5)
    assert parts["k-SAE"]["others"] == 0.0  # with k = 1 no other image has the latent


def test_the_effect_of_what_the_model_reads_is_above_a_random_directions() -> None:
    (entries, _), *_ = _ablated(reading(8, 8, 1))
    assert entries["effect"]["controls"]["a random direction"]["value"] == 0.0
    # Of a unit vector within the four channels that are read, and of a random one: 1 over 4 / 8 on average.
    assert 0.3 < entries["effect"]["value"] < 1.5
    unread = reading(8, 8, 1)
    with torch.no_grad():
        unread.W_dec.copy_(unread.W_dec.roll(4, 1))
    (entries, _), *_ = _ablated(unread)
    assert entries["effect"]["value"] < -5


def test_of_trainings_that_differ_nothing_is_told_apart() -> None:
    subsets = halves(200, 0)
    draw = torch.Generator().manual_seed(0)
    control = torch.rand(200, generator=draw)

    def entry(gain: float):
        from revelio.analysis.paired import measured

        ours = measured(lambda kept: float((control + gain)[kept].mean()), subsets)
        other = measured(lambda kept: float(control[kept].mean()), subsets)
        return {"x": against(ours, {"c": other}, 1)}

    assert entry(0.1)["x"]["verdict"] == "beats every control"
    same = over_trainings([entry(0.1), entry(0.11), entry(0.12)])["x"]
    assert same["verdict"] == "beats every control"
    apart = over_trainings([entry(0.3), entry(-0.2), entry(0.1)])["x"]
    assert apart["verdict"] == "not told apart from c"
    assert apart["differences"]["c"]["value"] == pytest.approx(0.2 / 3)


def _stores(folder: Path, *, labels: bool = True) -> tuple[Path, Path]:
    rows, classes = classes_in_channels(500)
    for name, part in (("train", slice(0, 300)), ("test", slice(300, 500))):
        ids = [f"i{i}" for i in range(500)][part]
        write_store(
            folder / name,
            rows[part],
            ids,
            classes[part].tolist() if labels else None,
            settings={"dataset": "d", "split": None, "classes": list("abcd") if labels else []},
        )
    return folder / "train", folder / "test"


def _trained(folder: Path, store: Path, seeds: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(
        str(train_sae(
            TrainSAEConfig(
                store=(store,), out=folder / f"k{s}", k=2, expansion=4, steps=40, batch_size=64, seed=s,
                learning_rate=1e-2, warmup_steps=1, held_out=0.0,
            )
        )[0].path)
        for s in seeds
    )  # fmt: skip


def test_an_evaluation_from_stores_to_a_page(tmp_path: Path) -> None:
    train, test = _stores(tmp_path)
    runs = _trained(tmp_path, train, (0, 1, 2))
    config = EvalSAEConfig(
        store=test, train_store=train, ksae=runs, out=tmp_path / "out", planted=2
    )
    result = eval_sae(config)
    assert set(result["ksaes"]) == set(runs)
    assert {"over_trainings", "stability", "planted"} <= set(result)
    assert set(result["stability_verdict"]) == set(result["planted_verdict"]) == {"0.7", "0.9"}
    assert result["notes"] == [NOT_IN_MODEL]
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert all(f"| {name} |" in page for name in ("fvu", "probe 5", "coverage 0.8"))


def _of_random_weights(folder: Path, train: Path, test: Path) -> dict[str, Path]:
    """Stores of the same images in another order, as of another model: noise without classes."""
    made = {}
    for name, path in (("random_train_store", train), ("random_store", test)):
        store = ActivationStore.open(path)
        rows = torch.rand(len(store), 8, generator=torch.Generator().manual_seed(len(store)))
        made[name] = folder / name / "test"
        settings = {"model": "m (random weights 0)"}
        write_store(made[name], rows.flip(0), list(store.ids)[::-1], settings=settings)
    return made


def test_the_same_recipe_on_random_weights_is_a_control(tmp_path: Path) -> None:
    train, test = _stores(tmp_path)
    runs = _trained(tmp_path, train, (0,))
    given = _of_random_weights(tmp_path, train, test)
    config = EvalSAEConfig(store=test, train_store=train, ksae=runs, out=tmp_path / "out", **given)
    measures = eval_sae(config)["ksaes"][runs[0]]["measures"]
    # Activations of noise: the classes, which the k-SAE's own activations show, are not in them.
    control = measures["probe 1"]["controls"]["random weights"]
    assert control["value"] < 0.65 < measures["probe 1"]["value"]
    assert control["difference"]["interval"][0] > 0
    [kept] = (tmp_path / "out" / "controls").iterdir()
    model = KSparseAutoencoder.from_pretrained(kept)
    # Paired by id: the control's FVU is that of its own rows, in the order of the held-out images.
    rows = torch.rand(200, 8, generator=torch.Generator().manual_seed(200))
    _, own = judged(model, rows, None)
    assert measures["fvu"]["controls"]["random weights"]["value"] == pytest.approx(own["fvu"].whole)
    for change, message in (
        ({"random_train_store": None}, "belong together"),
        ({"random_store": test}, "are of the same model"),
        ({"random_store": given["random_train_store"]}, "200 of the 200 images .* are not in"),
    ):
        with pytest.raises(ValueError, match=message):
            eval_sae(replace(config, **change))


def test_the_card_shows_the_result_and_keeps_what_else_it_says(tmp_path: Path) -> None:
    train, test = _stores(tmp_path, labels=False)
    runs = _trained(tmp_path, train, (0,))
    card = Path(runs[0]) / "README.md"
    if not card.is_file():
        card = Path(runs[0]) / "final" / "README.md"
    card.write_text(before := card.read_text() + "\nWritten by hand | <!-- and kept -->.\n")
    config = EvalSAEConfig(store=test, train_store=train, ksae=runs)
    result = eval_sae(config)
    after = card.read_text()
    assert after.startswith(before.rstrip()) and after.count(START) == after.count(END) == 1
    for name, entry in result["ksaes"][runs[0]]["measures"].items():
        assert f"| {name} | {entry['value']:.3f} |" in after and f"| {entry['verdict']} |" in after
    card.write_text(after + "More below.\n")
    eval_sae(replace(config, card=False))
    assert card.read_text() == after + "More below.\n"
    eval_sae(replace(config, seed=1))
    assert card.read_text().startswith(before.rstrip()) and card.read_text().endswith(
        "More below.\n"
    )
    assert card.read_text().count(START) == 1 and card.read_text() != after + "More below.\n"
    # By default the result lies in the run.
    assert (tmp_path / "k0" / "evaluation" / "evaluation.json").is_file()
    card.unlink()
    eval_sae(replace(config, seed=1))
    assert not card.exists()


def test_trained_controls_are_kept_and_not_trained_again(tmp_path: Path) -> None:
    train, test = _stores(tmp_path, labels=False)
    runs = _trained(tmp_path, train, (0,))
    config = EvalSAEConfig(
        store=test, train_store=train, ksae=runs, out=tmp_path / "out", trained_controls=True
    )
    result = eval_sae(config)
    assert set(result["ksaes"][runs[0]]["measures"]["fvu"]["controls"]) > set(TRAINED)
    kept = sorted((tmp_path / "out" / "controls").rglob("model.safetensors"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == len(TRAINED)
    assert eval_sae(config)["ksaes"] == result["ksaes"]
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_training_images_among_the_held_out_are_refused_or_said(tmp_path: Path) -> None:
    train, _ = _stores(tmp_path)
    runs = _trained(tmp_path, train, (0,))
    config = {"store": train, "train_store": train, "ksae": runs, "out": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"300 of the 300 images .* are in .* too: hold out other"):
        eval_sae(EvalSAEConfig(**config))
    notes = eval_sae(EvalSAEConfig(**config, overlap="allow"))["notes"]
    assert notes == ["300 of 300 images are training images", NOT_IN_MODEL]


def test_without_labels_and_with_too_few_images(tmp_path: Path) -> None:
    train, test = _stores(tmp_path, labels=False)
    runs = _trained(tmp_path, train, (0,))
    result = eval_sae(EvalSAEConfig(store=test, ksae=runs, out=tmp_path / "out"))
    assert set(result["ksaes"][runs[0]]["measures"]) == {"fvu", "cosine"}
    assert result["notes"] == [NO_TRAIN_STORE, UNLABELLED, NOT_IN_MODEL]
    write_store(tmp_path / "few", torch.rand(20, 8), [f"f{i}" for i in range(20)])
    with pytest.raises(ValueError, match="holds 20 images: measures need 100 up"):
        eval_sae(EvalSAEConfig(store=tmp_path / "few", ksae=runs, out=tmp_path / "few-out"))


def test_loss_recovered_of_an_extraction(tmp_path: Path) -> None:
    model = tiny_sd(tmp_path / "sd")
    (tmp_path / "photos").mkdir()
    for number in range(100):
        picture(number).save(tmp_path / "photos" / f"{number:03d}.png")
    data = DataConfig(source=str(tmp_path / "photos"))
    backbone = BackboneConfig(name=str(model), device="cpu")
    [store] = extract_to(
        ExtractRunConfig(
            out=tmp_path / "a", layers=("up_ft0",), timesteps=(200,), data=data, backbone=backbone
        )
    )
    runs = _trained(tmp_path, store.path, (0,))
    config = EvalSAEConfig(
        store=store.path,
        ksae=runs,
        out=tmp_path / "o",
        loss_images=60,
        data=data,
        backbone=backbone,
    )
    result = eval_sae(config)
    entry = result["ksaes"][runs[0]]
    losses = entry["in_model"]["loss"]
    whole = losses["mean"] - losses["true"]
    assert entry["measures"]["loss recovered"]["value"] == pytest.approx(
        (losses["mean"] - losses["k-SAE"]) / whole
    )
    assert "effect" in entry["measures"] and NOT_IN_MODEL not in result["notes"]
    assert "| loss recovered |" in (tmp_path / "o" / "evaluation.md").read_text()
    with pytest.raises(ValueError, match="loss_images is 5: intervals need 10 images up"):
        eval_sae(replace(config, loss_images=5))
    other = BackboneConfig(name=str(tiny_sd(tmp_path / "other", seed=1)), device="cpu")
    with pytest.raises(ValueError, match="needs the store's own model"):
        eval_sae(replace(config, backbone=other))
