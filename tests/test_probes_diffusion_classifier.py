"""The Diffusion Classifier against a plain loop over images, samples and classes."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pytest
import torch
from backbones_helpers import picture, tiny_dit, tiny_sd
from flow_helpers import tiny_sd3
from scipy.stats import ttest_1samp
from torch.nn import functional

from revelio.backbones.base import Conditioning
from revelio.backbones.diffusion.schedule import Schedule, keyed_noise, reference_schedule
from revelio.backbones.registry import load_backbone
from revelio.data.dataset import ImageDataset
from revelio.probes.config import DiffusionClassifierConfig
from revelio.probes.diffusion_classifier import (
    classify,
    diffusion_classifier,
    even_timesteps,
    stages,
)

IMAGES = ImageDataset("pictures", None, (), ["a", "b", "c"], None, picture)
FAMILIES = {
    "epsilon": (tiny_sd, ["a cat", "a dog", "a cat on a dog"]),
    "velocity": (lambda folder: tiny_sd(folder, prediction_type="v_prediction"), ["a", "b", "c"]),
    "flow": (tiny_sd3, ["a cat", "a dog", "a car"]),
    "classes": (tiny_dit, ["3", "", "7"]),
}
MEASURES = {"l1": functional.l1_loss, "l2": functional.mse_loss, "huber": functional.huber_loss}


@torch.no_grad()
def plain(model: Any, prompts: list[str], count: int, loss: str, seed: int = 0) -> np.ndarray:
    """Errors (images, samples, classes), one pass each."""
    found = np.zeros((len(IMAGES), count, len(prompts)))
    schedule: Schedule = model.schedule
    for i, name in enumerate(IMAGES.ids):
        x0 = model.encode(model.transform(picture(i))[None]).float()
        for j in range(count):
            t = int((j + 0.5) * 1000 / count)
            noise = keyed_noise(x0.shape[1:], [name], seed=seed, timestep=t, draw=j)
            alpha, sigma = float(schedule.alphas[t]), float(schedule.sigmas[t])
            x_t = alpha * x0 + sigma * noise
            target = {
                "epsilon": noise,
                "v_prediction": alpha * noise - sigma * x0,
                "flow": noise - x0,
            }[schedule.prediction]
            for c, prompt in enumerate(prompts):
                output = model.predict(x_t, t, model.conditioning([prompt]))
                found[i, j, c] = MEASURES[loss](output, target).item()
    return found


@pytest.mark.parametrize(
    ("family", "loss"),
    [("epsilon", "l2"), ("velocity", "l1"), ("flow", "huber"), ("classes", "l2")],
)
def test_without_pruning_the_errors_are_a_plain_loops(tmp_path, family, loss):
    build, prompts = FAMILIES[family]
    model: Any = load_backbone(str(build(tmp_path)), device="cpu")
    expected = plain(model, prompts, 6, loss)
    config = DiffusionClassifierConfig(
        samples=(6,), keep=(), loss=loss, batch_size=7, images_at_once=2
    )
    rows = list(diffusion_classifier(model, IMAGES, prompts, config))
    assert [row.id for row in rows] == IMAGES.ids and all(row.seconds > 0 for row in rows)
    found = np.array([row.errors for row in rows])
    np.testing.assert_allclose(found, expected.mean(1), rtol=1e-4)
    assert [row.predicted for row in rows] == expected.mean(1).argmin(1).tolist()
    assert all(row.samples == [6, 6, 6] for row in rows)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_row_does_not_depend_on_the_batch(tmp_path, batch_size):
    model: Any = load_backbone(str(tiny_dit(tmp_path)), device="cpu")
    prompts = [str(i) for i in range(6)]
    config = DiffusionClassifierConfig(samples=(2, 5, 9), keep=(4, 2), batch_size=batch_size)
    rows = list(diffusion_classifier(model, IMAGES, prompts, config))
    done = {rows[0].id, rows[2].id}
    [alone] = diffusion_classifier(model, IMAGES, prompts, config, done=done)
    np.testing.assert_allclose(alone.errors, rows[1].errors, rtol=1e-4)
    assert {**asdict(alone), "seconds": 0, "errors": 0} == {
        **asdict(rows[1]),
        "seconds": 0,
        "errors": 0,
    }
    assert sorted(alone.samples) == [2, 2, 5, 5, 9, 9]
    errors = plain(model, prompts, 9, "l2")[1]
    for c, count in enumerate(alone.samples):
        taken = torch.cat(stages((2, 5, 9))[: {2: 1, 5: 2, 9: 3}[count]])
        assert alone.errors[c] == pytest.approx(errors[taken, c].mean(), rel=1e-4)


def test_prompts_and_latents_are_encoded_once(tmp_path, monkeypatch):
    model: Any = load_backbone(str(tiny_sd(tmp_path)), device="cpu")
    encoded = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda p: encoded.append(len(p)) or encode(p))
    config = DiffusionClassifierConfig(samples=(2, 4), keep=(2,), images_at_once=2)
    list(diffusion_classifier(model, IMAGES, ["a", "b", "a"], config))
    assert encoded == [2, 1] and model.text.encoded == 2


@dataclass
class Planted:
    """Knows each class's latent, and so the noise exactly; the wrong classes' noise is off."""

    means: torch.Tensor
    jitter: float = 0.0
    passes: int = 0

    def __post_init__(self):
        self.schedule = reference_schedule("scaled_linear")

    def predict(self, x_t, t, conditioning):
        self.passes += len(x_t)
        alpha, sigma = (
            table[t].view(-1, 1, 1, 1) for table in (self.schedule.alphas, self.schedule.sigmas)
        )
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(self.passes))
        return (x_t - alpha * self.means[conditioning.rows]) / sigma + self.jitter * noise


def planted(classes=12, jitter=0.0):
    means = torch.randn(classes, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    return Planted(means, jitter), Conditioning(torch.arange(classes))


def test_pruning_keeps_the_planted_class_and_spares_passes():
    model, classes = planted(jitter=0.5)
    ids = [str(i) for i in range(12)]
    config = DiffusionClassifierConfig(samples=(4, 16, 40), keep=(5, 2), seed=3)
    rows = classify(model, model.means, ids, classes, config)
    assert [row.predicted for row in rows] == list(range(12))
    assert model.passes == 12 * (4 * 12 + 12 * 5 + 24 * 2) < 12 * 12 * 40 / 3
    whole = classify(
        model, model.means, ids, classes, DiffusionClassifierConfig(samples=(40,), keep=())
    )
    assert [row.predicted for row in whole] == list(range(12))
    assert all(row.by_stage[-1] == row.predicted and len(row.by_stage) == 3 for row in rows)


def test_an_image_stops_once_its_class_is_surely_the_best():
    model, classes = planted(classes=4, jitter=0.05)
    # The second image lies between two classes, which no number of samples tells apart.
    images = torch.stack([model.means[2], (model.means[0] + model.means[1]) / 2])
    config = DiffusionClassifierConfig(
        samples=(8, 16), keep=(4,), timesteps=(700, 800), confidence=0.99
    )
    sure, unsure = classify(model, images, ["sure", "unsure"], classes, config)
    assert (sure.predicted, sure.by_stage, sure.samples) == (2, [2], [8] * 4)
    assert len(unsure.by_stage) == 2 and unsure.samples == [16] * 4 and unsure.predicted in (0, 1)
    assert sure.seconds < unsure.seconds


def test_the_stopping_rule_is_a_paired_t_test():
    from revelio.probes.diffusion_classifier import _separated

    errors = torch.rand(40, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors[:, :, 0] -= torch.linspace(0, 0.6, 40, dtype=torch.float64)[:, None]
    best = errors.mean(1).argmin(1)
    active = torch.arange(3).expand(40, -1)
    expected = []
    for one, b in zip(errors.numpy(), best.tolist(), strict=True):
        others = [one[:, c] - one[:, b] for c in range(3) if c != b]
        tests: Any = [ttest_1samp(gap, 0, alternative="greater") for gap in others]
        worst = max(test.pvalue for test in tests)
        expected.append(worst * 2 < 0.05)
    assert 5 < sum(expected) < 35
    assert _separated(errors, active, best, 0.95).tolist() == expected


def test_the_confidence_holds_over_all_stages_together(monkeypatch):
    from revelio.probes import diffusion_classifier as module

    # Errors of two classes at 24 samples, by hand: looks at 8 and at 16, and no more at the end.
    images, confidence = 300, 0.9
    table = torch.randn(
        images, 24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    monkeypatch.setattr(
        module._Passes, "errors", lambda _, i, s, k: table[i[:, None, None], s[:, None], k[:, None]]
    )
    model, classes = planted(classes=2)
    config = DiffusionClassifierConfig(
        samples=(8, 16, 24), keep=(2, 2), confidence=confidence, timesteps=(700, 800)
    )
    x0 = model.means[:1].expand(images, -1, -1, -1)
    rows = classify(model, x0, [str(i) for i in range(images)], classes, config)
    first, second, _ = stages((8, 16, 24))
    expected, each_alone = [], 0
    for one in table:
        looks = [one[first], one[torch.cat([first, second])]]
        # Half of the two-sided p: the worse class is asked about, whichever it is.
        tests: Any = [ttest_1samp((x[:, 0] - x[:, 1]).numpy(), 0) for x in looks]
        p = [float(test.pvalue) / 2 for test in tests]
        stops = [k for k, value in enumerate(p, 1) if value < (1 - confidence) / 2]
        expected.append(stops[0] if stops else 3)
        each_alone += min(p) < 1 - confidence
    assert [len(row.by_stage) for row in rows] == expected
    # Were each look of that confidence alone, many more would stop.
    assert 20 < sum(count < 3 for count in expected) < 0.7 * each_alone


def test_samples_are_spread_evenly_in_every_stage():
    assert even_timesteps(4, None, 1000).tolist() == [125, 375, 625, 875]
    assert even_timesteps(2, (100, 200), 1000).tolist() == [125, 175]
    first, second = stages((25, 100))
    assert first.tolist() == list(range(2, 100, 4))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(100))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"samples": (4, 4)}, "must grow"),
        ({"samples": (4,)}, "samples has 1 stage and keep 1 number"),
        ({"samples": (4, 8, 16), "keep": (2, 3)}, "never grow"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_fit_no_plan_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        DiffusionClassifierConfig(**settings)


def test_requests_that_make_no_sense_are_named():
    model, classes = planted()
    config = DiffusionClassifierConfig(samples=(2,), keep=())
    with pytest.raises(ValueError, match="1 class:"):
        classify(
            model, model.means, [str(i) for i in range(12)], classes[torch.tensor([0])], config
        )
    late = DiffusionClassifierConfig(samples=(2,), keep=(), timesteps=(0, 2000))
    with pytest.raises(ValueError, match="outside the schedule"):
        classify(model, model.means, [str(i) for i in range(12)], classes, late)
