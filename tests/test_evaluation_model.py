"""k-SAEs inside the model: loss recovered and ablations, against plain hooks and closed forms."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones_helpers import picture, tiny_clip, tiny_dinov2, tiny_dit, tiny_sd
from evaluation_helpers import classes_in_channels, reading

from revelio.analysis.paired import against, halves
from revelio.backbones.registry import load_backbone
from revelio.evaluation.ablation import ablations
from revelio.evaluation.downstream import Denoised, Downstream, Embedded, Reader, replaced
from revelio.evaluation.encoded import encoded
from revelio.evaluation.judge import over_trainings
from revelio.evaluation.loss_recovered import loss_recovered, reconstruction, recovered
from revelio.evaluation.measures import held_out
from revelio.sae.model import KSparseAutoencoder


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

    def less(rows: torch.Tensor, _: slice) -> torch.Tensor:
        return rows - vector

    found = downstream.outputs(less)
    torch.testing.assert_close(found, plain)
    losses = ((plain - downstream.target) ** 2).mean((1, 2, 3)).double()
    torch.testing.assert_close(downstream.losses(found), losses)
    # Of images given twice and out of order, those of one pass.
    images = torch.tensor([3, 0, 3])
    some = downstream.outputs(less, images)
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
    losses = downstream.losses(downstream.outputs(less))
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


def _ablated(model: KSparseAutoencoder, scales: tuple[float, ...] = ()):
    """On pooled rows of equal cells; or, with scales, on cells that differ by them."""
    pooled, labels = classes_in_channels()
    cells = pooled[:, None] * torch.tensor(scales or (1.0, 1.0, 1.0))[:, None]
    rows = cells if scales else pooled
    images = held_out(rows, labels, halves(len(rows), 0), 0)
    downstream = Channels(Passing(), "x", cells, batch_size=64)
    reader = Reader.of(downstream, images)
    assert reader is not None
    codes = {"k-SAE": encoded(model, rows), "random": encoded(KSparseAutoencoder(8, 8, 1), rows)}
    return ablations(downstream, codes, images, reader), downstream, images, reader, rows


class Missed(Channels):
    """Its loss is how far the output is from its own, or, turned around, how near."""

    def __init__(self, *arguments, sign: int) -> None:
        super().__init__(*arguments)
        self.sign = sign

    def losses(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.sign * (outputs - self.unchanged).double().square().sum(1)


@pytest.mark.parametrize("sign", [1, -1])
def test_loss_recovered_has_a_scale_only_where_the_mean_is_worse(sign: int) -> None:
    rows, labels = classes_in_channels()
    images = held_out(rows, labels, halves(len(rows), 0), 0)
    downstream = Missed(Passing(), "x", rows[:, None], sign=sign)
    models = {"k-SAE": reading(8, 8, 1), "random": KSparseAutoencoder(8, 8, 1)}
    entries, told = recovered(downstream, models, rows.mean(0), images, None)
    x, kept = rows[:, :4].double().numpy(), np.zeros((len(rows), 8))
    for i, row in enumerate(rows):
        kept[i, int(row.argmax())] = float(row.max())
    wanted = 1 - ((kept[:, :4] - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert entries["output recovered"]["value"] == pytest.approx(wanted, rel=1e-4)
    assert entries["output recovered"]["verdict"] == "beats every control"
    assert (told["loss_scale"]["value"] > 0) == (sign > 0)
    assert ("loss recovered" in entries) == (sign > 0)
    if sign > 0:
        assert entries["loss recovered"]["value"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("scales", [(), (0.5, 1.0, 1.5)])
def test_ablating_the_latents_of_the_classes_takes_them_and_nothing_else(
    scales: tuple[float, ...],
) -> None:
    (entries, parts), _, images, reader, rows = _ablated(reading(8, 8, 1), scales)
    assert entries["ablation"]["verdict"] == "beats every control"
    assert set(entries["ablation"]["controls"]) == {
        "random", "a random direction", "another latent of equal mass",
    }  # fmt: skip
    # The latent of class c is channel c: a loop over classes and judged images, without hooks.
    own = []
    for c in range(4):
        drops = []
        for i in (images.judged & (images.labels == c)).nonzero()[:, 0].tolist():
            x = (rows[i].mean(0) if scales else rows[i]).clone()
            before = reader.fitted.predict_log_proba(x[None, :4].double().numpy())[0, c]
            if int(x.argmax()) == c:
                x[c] = 0
            drops.append(
                before - reader.fitted.predict_log_proba(x[None, :4].double().numpy())[0, c]
            )
        own.append(np.mean(drops))
    assert parts["k-SAE"]["own"] == pytest.approx(np.mean(own), rel=1e-5)
    assert parts["k-SAE"]["others"] == 0.0  # with k = 1 no other image has the latent


def test_a_class_that_the_reader_never_saw_is_no_part_of_the_ablation() -> None:
    rows, labels = classes_in_channels()
    rows, labels = torch.cat([rows, torch.eye(8)[7:]]), torch.cat([labels, torch.tensor([4])])
    images = held_out(rows, labels, halves(len(rows), 0), 0)
    assert images.judged[-1]  # its one image is not in the half that is read
    downstream = Channels(Passing(), "x", rows[:, None], batch_size=64)
    reader = Reader.of(downstream, images)
    assert reader is not None and reader.knows(torch.arange(5)).tolist() == [True] * 4 + [False]
    model = reading(8, 8, 1)
    entries, parts = ablations(downstream, {"k-SAE": encoded(model, rows)}, images, reader)
    # No detector fires on that image, whose dimension is the eighth: by a loop over the other classes.
    own = []
    for c in range(4):
        kept = (images.judged & (labels == c)).nonzero()[:, 0].tolist()
        x = rows[kept, :4].double().numpy()
        without = x * ((x != x.max(1, keepdims=True)) | (np.arange(4) != c))
        read = reader.fitted.predict_log_proba
        own.append((read(x)[:, c] - read(without)[:, c]).mean())
    assert parts["k-SAE"] == {"own": pytest.approx(np.mean(own), rel=1e-5), "others": 0.0}
    assert entries["ablation"]["value"] == pytest.approx(np.mean(own), rel=1e-5)


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


def test_what_some_half_says_nothing_of_is_left_out() -> None:
    """One live latent, and a half without the images that it is strongest on, or without any: no interval."""
    rows, labels = classes_in_channels()
    model = reading(8, 8, 1)
    with torch.no_grad():
        model.b_enc[1:] = -10.0
    codes = {"k-SAE": encoded(model, rows), "random": encoded(KSparseAutoencoder(8, 8, 1), rows)}
    silent = torch.ones(len(rows), dtype=torch.bool)
    silent[codes["k-SAE"].top(0)[0][:5]] = False
    downstream = Channels(Passing(), "x", rows[:, None], batch_size=64)
    every = torch.ones_like(halves(len(rows), 0))
    reader = Reader.of(downstream, held_out(rows, labels, every, 0))
    assert reader is not None
    for first, effect in ((every[0], True), (silent, False)):
        subsets = torch.cat([first[None], every[1:]])
        entries, _ = ablations(downstream, codes, held_out(rows, labels, subsets, 0), reader)
        assert ("effect" in entries) == effect and "ablation" in entries
        json.dumps(entries, allow_nan=False)
    images = held_out(rows, labels, torch.cat([~every[:1], every[1:]]), 0)
    assert ablations(downstream, codes, images, reader) == ({}, {})
    entries, told = recovered(downstream, {"k-SAE": model}, rows.mean(0), images, reader)
    assert "downstream probe" not in entries and "accuracy" not in told


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
