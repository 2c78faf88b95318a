"""The mini models' loop, losses and the Diffusion Classifier, against plain formulas."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from revelio.probes.split import draw
from tools.mini.clip import class_contrastive
from tools.mini.configs import DitShape, Schedule, UnetShape
from tools.mini.denoisers import DIT_CLASSES, ClassDenoiser, build_dit, build_unet
from tools.mini.diffusion import (
    build_scheduler,
    measure,
    noise_loss,
    noise_schedule,
    stratified_timesteps,
)
from tools.mini.loop import Trainer, learning_rate
from tools.mini.probe import STRENGTHS, ProbeData, best_strength, held_out_accuracy, probe
from tools.mini.train import read_config

CONFIGS = sorted((Path(__file__).parents[1] / "tools" / "configs").rglob("*.yaml"))


def small_trainer() -> Trainer:
    torch.manual_seed(0)
    return Trainer(nn.Linear(3, 2), Schedule(minutes=1e6, warmup_steps=1, learning_rate=0.1))


def small_loss(trainer: Trainer):
    def loss(generator: torch.Generator) -> torch.Tensor:
        return trainer.model(torch.randn(4, 3, generator=generator)).pow(2).mean()

    return loss


def test_a_resumed_training_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, first, second = small_trainer(), small_trainer(), small_trainer()
    for _ in range(6):
        whole.update(small_loss(whole))
    for _ in range(3):
        first.update(small_loss(first))
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    second.seconds = whole.seconds = 0.0
    for _ in range(3):
        second.update(small_loss(second))
    assert second.step == whole.step
    for a, b in zip(
        whole.average + whole.parameters, second.average + second.parameters, strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_average_follows_its_formula_and_swapping_twice_is_nothing() -> None:
    trainer = small_trainer()
    mean = trainer.parameters[0].detach().clone()
    for step in range(1, 4):
        trainer.update(small_loss(trainer))
        decay = min(0.999, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * trainer.parameters[0].detach()
    assert torch.allclose(trainer.average[0], mean, atol=1e-6)
    before = trainer.parameters[0].detach().clone()
    trainer.swap()
    assert torch.allclose(trainer.parameters[0].detach(), mean, atol=1e-6)
    trainer.swap()
    assert torch.equal(trainer.parameters[0].detach(), before)


@pytest.mark.parametrize(
    ("step", "progress", "share"), [(0, 0.0, 0.1), (9, 0.5, 1.0), (99, 0.8, 0.5), (99, 1.0, 0.0)]
)
def test_the_rate_warms_up_holds_and_falls_to_zero(
    step: int, progress: float, share: float
) -> None:
    schedule = Schedule(minutes=1, learning_rate=2.0, warmup_steps=10, decay=0.4)
    assert learning_rate(schedule, step, progress) == pytest.approx(2.0 * share)


def test_the_contrastive_loss_is_cliploss_when_every_caption_is_its_own() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5)
    plain = nn.functional.cross_entropy
    wanted = (plain(logits, target) + plain(logits.T, target)) / 2
    assert torch.allclose(class_contrastive(logits, target), wanted)


def test_the_contrastive_loss_with_shared_captions() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 2))
    owner = [0, 1, 1, 0]
    rows = np.mean(
        [np.log(np.exp(row).sum()) - row[o] for row, o in zip(logits, owner, strict=True)]
    )
    columns = [
        np.log(np.exp(logits[:, u]).sum())
        - np.mean([logits[i, u] for i in range(4) if owner[i] == u])
        for u in range(2)
    ]
    found = class_contrastive(torch.tensor(logits), torch.tensor(owner))
    assert float(found) == pytest.approx(0.5 * rows + 0.5 * np.mean(columns))


def test_timesteps_are_stratified() -> None:
    times = stratified_timesteps(50, torch.Generator().manual_seed(3))
    assert sorted((times // 20).tolist()) == list(range(50))


class Oracle:
    """Knows each class's latent and so the noise exactly; the wrong class's noise is off."""

    model = nn.Identity()

    def __init__(self, means: torch.Tensor, alphas: torch.Tensor) -> None:
        self.means, self.alphas = means, alphas

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        level = self.alphas[timesteps].view(-1, 1, 1, 1)
        return (noisy - level.sqrt() * self.means[rows]) / (1 - level).sqrt()

    def draw_rows(self, labels: torch.Tensor, empty_share: float, generator: torch.Generator):
        return labels

    def prompt_rows(self) -> torch.Tensor:
        return torch.arange(len(self.means))


def test_training_is_checked_by_the_diffusion_classifier() -> None:
    alphas = build_scheduler().alphas_cumprod
    means = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    oracle, labels = Oracle(means, alphas), torch.arange(60) % 3
    for wrong, accuracy in ((0, 1.0), (1, 0.0)):
        found = measure(oracle, means[labels], (labels + wrong) % 3, noise_schedule(), 5.0)
        assert found["diffusion_classifier"] == accuracy


def test_the_noise_loss_weighs_by_min_snr() -> None:
    alphas = build_scheduler().alphas_cumprod
    clean = torch.zeros(64, 1, 2, 2)

    class Silent(Oracle):
        def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, rows: torch.Tensor):
            self.times = timesteps
            self.noise = noisy / (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
            return torch.zeros_like(noisy)

    silent = Silent(clean, alphas)
    loss = noise_loss(
        silent, clean, torch.zeros(64).long(), noise_schedule(), 5.0, torch.Generator()
    )
    ratio = (alphas / (1 - alphas))[silent.times]
    weight = torch.minimum(ratio, torch.tensor(5.0)) / ratio
    wanted = (weight * silent.noise.pow(2).mean((1, 2, 3))).mean()
    assert torch.allclose(loss, wanted, rtol=1e-4)


def test_the_unet_has_the_blocks_of_sd15() -> None:
    unet = build_unet(UnetShape(channels=(8, 8, 16, 16), heads=(1, 1, 2, 2)), 12)
    assert unet.config["down_block_types"] == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert unet.config["up_block_types"] == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3


def test_the_dit_has_a_null_class_where_its_pipeline_looks() -> None:
    denoiser = ClassDenoiser(build_dit(DitShape(heads=1, head_width=8, blocks=1)), 10)
    labels = torch.arange(10).repeat(50)
    rows = denoiser.draw_rows(labels, 0.2, torch.Generator().manual_seed(0))
    dropped = rows == DIT_CLASSES
    assert 60 < int(dropped.sum()) < 140 and torch.equal(rows[~dropped], labels[~dropped])
    assert denoiser.model(
        torch.zeros(1, 4, 16, 16), torch.tensor([1]), torch.tensor([1000])
    ).sample.shape


def test_the_probe_is_scikit_learns_ridge() -> None:
    from sklearn.linear_model import Ridge

    generator = np.random.default_rng(1)
    rows, labels = generator.normal(size=(90, 7)), np.arange(90) % 3
    data = ProbeData(rows[:60], labels[:60], rows[60:], labels[60:])
    labelled = np.arange(30)
    scaled = (rows - rows[:30].mean(0)) / rows[:30].std(0) / np.sqrt(7)
    spare, right = np.arange(30, 60), {}
    for strength in STRENGTHS:
        peer = Ridge(alpha=strength).fit(scaled[:30], np.eye(3)[labels[:30]])
        wanted = (peer.predict(scaled[60:]).argmax(1) == labels[60:]).mean()
        assert held_out_accuracy(data, labelled, strength) == pytest.approx(wanted)
        right[strength] = (peer.predict(scaled[30:60]).argmax(1) == labels[30:60]).mean()
    assert right[best_strength(data, labelled, spare)] == max(right.values())


def test_the_probe_finds_what_is_there_and_no_more() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    signal = np.eye(3)[labels] * 4 + generator.normal(size=(300, 3))
    noise = generator.normal(size=(300, 3))
    for rows, low, high in ((signal, 0.9, 1.0), (noise, 0.15, 0.55)):
        data = ProbeData(rows[:150], labels[:150], rows[150:], labels[150:])
        assert low < probe(data, 10, seeds=2)["value"] <= high  # pyright: ignore
    labelled, spare = draw(labels, 10, 1)
    assert np.bincount(labels[labelled]).tolist() == [10] * 3
    assert not set(labelled) & set(spare)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_is_read(path: Path) -> None:
    assert read_config(path, minutes=2.0).schedule.minutes == 2.0
    assert read_config(path).name == path.stem


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("kind: vae\nname: x\nsources: {}\nschedule: {minutes: 1, speed: 2}\n")
    with pytest.raises(ValueError, match="speed"):
        read_config(path)
