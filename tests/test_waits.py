"""Loops on a device that is pretended: how often their host waits for it."""

from pathlib import Path

import pytest
import torch
from backbones_helpers import picture
from device_helpers import FAMILIES, SIDES
from diffc_helpers import separable
from steering_helpers import dit, ksae_of, sd
from waits_helpers import PretendedCuda

from revelio.activations.encode import cells_of, pooled, random_cells
from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.backbones.hooks import hooked
from revelio.backbones.registry import load_backbone
from revelio.diffc import train as diffc
from revelio.diffc.config import FitConfig
from revelio.diffc.model import DiffC
from revelio.diffc.sources import TensorGrids
from revelio.steering.edits import Direction, Edit, LatentChange
from revelio.steering.steer import edited


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_batch_of_an_extraction_is_not_waited_for(tmp_path: Path, family: str) -> None:
    build, layers, timestep = FAMILIES[family]
    place, side = str(build(tmp_path / family)), SIDES.get(family)
    backbone, device = (
        load_backbone(place, layers=layers, device="cpu", image_size=side),
        PretendedCuda(),
    )
    device.take(backbone, but=getattr(backbone, "schedule", None))
    pixels = torch.stack([backbone.transform(picture(i)) for i in range(2)])
    for _ in range(2):  # prompts are encoded once
        device.waits.clear()
        with device.used(), torch.no_grad():
            encoded = backbone.encode(pixels.pin_memory())
            found = backbone.activations(encoded, ["a", "b"], layers, timestep=timestep)
            for grid in found.values():
                assert device.has(pooled(grid, "mean"))
                if grid.ndim == 4:
                    height, width = grid.shape[2:]
                    assert device.has(
                        cells_of(grid, random_cells(["a", "b"], (height, width), 2, 0))
                    )
    assert device.waits == []


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_of_diff_c_waits_once(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    every, labels = separable(8)
    settings = FitConfig(epochs=1, batch_size=8, validation=0.0)
    model, device = DiffC(every.shape[1], 3, width=8, dropout=dropout), PretendedCuda()
    training = diffc.Training.start(model, settings)
    model.train()
    device.take(model)
    ids = torch.tensor(labels)[:8]
    for _ in range(3):
        device.waits.clear()
        with device.used():
            diffc._step(training, every[:8], ids)
    assert device.waits == ["revelio/diffc/train.py:_step tolist"]


def test_dropout_of_a_model_on_a_cpu_asks_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own takes the states of all cards, and warns where there are several."""
    every, labels = separable(8)
    settings = FitConfig(epochs=1, batch_size=8, validation=0.0)
    found = []
    for cards in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        training = diffc.Training.start(DiffC(every.shape[1], 3, width=8, dropout=0.3), settings)
        before = torch.get_rng_state()
        source = TensorGrids([every], labels)
        found.append([s.loss for s in diffc.train(training, source, range(len(labels)), settings)])
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def changes() -> dict[str, Edit]:
    ksae, mask = ksae_of(12), torch.ones(8, 8)
    one = Direction(torch.ones(1, 12))
    found = {
        branch: Edit("up_ft0", one, 12, branch=branch)
        for branch in ("both", "opposed", "conditional")
    }
    found["mask"] = Edit("up_ft0", one, 12, mask=mask)
    found["range"] = Edit("up_ft0", one, 12, timesteps=(0, 500))
    for operation in ("scale", "add"):
        latents = LatentChange(ksae, {3: 2.0, 11: 1.0}, operation)
        found[operation] = Edit("up_ft0", latents, 12)
    return found


@pytest.mark.parametrize("name", list(changes()))
def test_an_edit_of_a_denoiser_waits_for_nothing(name: str) -> None:
    """Of a pipeline's own code nothing is told: schedulers wait where they like."""
    pipeline, one, device = sd(), changes()[name], PretendedCuda()
    plain, (x, text, now) = (
        pipeline.unet,
        (torch.randn(4, 4, 8, 8), torch.randn(4, 7, 16), torch.tensor(300)),
    )
    pipeline._guidance_scale = 3.0
    found, waits = [], []
    for pretended in (False, True):
        if pretended:
            device.take(
                [
                    plain,
                    getattr(one.change, "ksae", None),
                    given := (x.clone(), now.clone(), text.clone()),
                ]
            )
        with edited(pipeline, [one]), torch.no_grad():
            if pretended:
                with device.used():
                    found.append(plain(*given).sample)
                waits = device.waits
            else:
                found.append(plain(x, now, text).sample)
    assert torch.equal(*found) and waits == []


def test_a_class_conditional_batch_is_edited_by_its_rows_without_a_wait() -> None:
    pipeline, device = dit(), PretendedCuda()
    ksae = ksae_of(16)
    one = Edit(
        "block1",
        LatentChange(ksae, {3: 2.0, 5: 1.0}, "add", where="fires"),
        16,
        branch="conditional",
    )
    labels = torch.tensor([1000, 3, 1000, 5])
    x, times = torch.randn(4, 4, 8, 8), torch.full((4,), 300)
    layers, outputs = PipelineLayers(pipeline), []
    for edits in ([], [one]):
        device.take([pipeline.transformer, ksae, x, times, labels])
        with (
            edited(pipeline, edits),
            hooked(layers, {"block1": lambda out: outputs.append(out.clone())}, exact=False),
            device.used(),
            torch.no_grad(),
        ):
            pipeline.transformer(x, timestep=times, class_labels=labels)
    before, after = outputs
    assert device.waits == []
    assert torch.equal(before[::2], after[::2]) and not torch.equal(before, after)
    wanted = before[1::2] + one.change(before[1::2])
    torch.testing.assert_close(after[1::2], wanted)
