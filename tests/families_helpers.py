"""What the test of every family of diffusion models compares: ours with the pipeline's own parts."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones_helpers import fp16_only, picture
from diffusers import DDPMScheduler
from torch import Tensor, nn

from revelio.backbones.base import DiffusionModel
from revelio.backbones.diffusion.schedule import keyed_noise
from revelio.backbones.diffusion.unet import cut, layer_module
from revelio.backbones.layers import LayerSpec
from revelio.backbones.registry import load_backbone
from revelio.backbones.source import Description

IDS = ["a", "b"]
NEAR = {"atol": 1e-5, "rtol": 1e-4}


def load_whole(folder: Path | str, **settings: Any) -> Any:
    """The uncut model on the CPU."""
    model = load_backbone(str(folder), device="cpu", **settings)
    assert isinstance(model, DiffusionModel)
    return model


def pixels_for(model: Any) -> Tensor:
    """Two pictures as the model wants them."""
    return torch.stack([model.transform(picture(i)) for i in range(2)])


def unet_modules(unet: Any) -> dict[str, nn.Module]:
    """A U-Net's layers: the middle block, and the decoder's."""
    return {"bottleneck": unet.mid_block} | {
        f"up_ft{i}": block for i, block in enumerate(unet.up_blocks)
    }


@torch.no_grad()
def captured(modules: Mapping[str, nn.Module], call: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """What each module gives during a call, by plain forward hooks, and what the call gives."""
    kept: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
        for name, module in modules.items()
    ]
    output = call()
    for handle in handles:
        handle.remove()
    return kept, output


def noised_by_diffusers(scheduler: Any, x0: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """A draw of q(x_t | x_0) by diffusers' DDPM of the same betas, and the timestep of each image."""
    noise = keyed_noise(x0.shape[1:], IDS, seed=0, timestep=timestep, draw=0)
    steps = torch.full((len(x0),), timestep)
    return DDPMScheduler.from_config(scheduler.config).add_noise(x0.float(), noise, steps), steps


def check_family(
    folder: Path,
    modules: Mapping[str, nn.Module],
    scheduler: Any,
    call: Callable[[Tensor, Tensor], Tensor],
    prompts: Sequence[str],
    timestep: int,
    *,
    grid: Callable[[Tensor], Tensor] = lambda output: output,
    cuts: bool = True,
) -> None:
    """Activations and prediction are those of the pipeline's own call; cut models' are bit-equal.

    Args:
        folder: the model.
        modules: of the pipeline's own denoiser, by layer.
        scheduler: the pipeline's.
        call: the pipeline's own denoiser at x_t and timesteps, with what it says of ``prompts``.
        prompts: two of them.
        timestep: of both images.
        grid: a module's output as a grid.
        cuts: whether to cut the model after each layer, too.
    """
    whole = load_whole(folder)
    assert list(whole.layers) == list(modules)
    pixels = pixels_for(whole)
    x0 = whole.encode(pixels)
    x_t, steps = noised_by_diffusers(scheduler, x0, timestep)
    expected, output = captured(modules, lambda: call(x_t, steps))
    found = whole.activations(x0, IDS, list(modules), timestep=timestep, prompts=prompts)
    side = pixels.shape[-1]
    for layer, spec in whole.layers.items():
        assert found[layer].shape == (2, spec.channels, side // spec.stride, side // spec.stride)
        torch.testing.assert_close(found[layer], grid(expected[layer]), **NEAR)
        if not cuts:
            continue
        cut = load_whole(folder, layers=[layer])
        assert list(cut.layers)[-1] == layer
        alone = cut.activations(x0, IDS, [layer], timestep=timestep, prompts=prompts)[layer]
        assert torch.equal(alone, found[layer])
    with torch.no_grad():
        predicted = whole.predict(x_t, steps, whole.conditioning(prompts))
    torch.testing.assert_close(predicted, output, **NEAR)


def check_generation(ours: Any, theirs: Any, **settings: Any) -> None:
    """Two pipelines generate the same picture of a prompt, with guidance."""
    pictures = []
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
        drawn = torch.Generator().manual_seed(4)
        given = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"} | settings
        pictures.append(torch.as_tensor(pipeline("a cat", generator=drawn, **given).images))
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-4, rtol=1e-3)


def check_files(
    folder: Path, place: Path, layer: str, x0: Tensor, prompts: Sequence[str], expected: Tensor
) -> None:
    """A half-precision variant gives nearly the same at t = 25, the U-Net in a single file the same.

    Args:
        folder: the model.
        place: an empty folder.
        layer: that is compared.
        x0: two encoded pictures.
        prompts: of both.
        expected: the layer's activations.
    """
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    copy = shutil.copy(weights, place / "whole.safetensors")
    names = {str(fp16_only(folder, place / "m")): 0.02, f"{folder}+{copy}": 0.0}
    for name, tolerance in names.items():
        other = load_whole(name, layers=[layer])
        found = other.activations(x0, IDS, [layer], timestep=25, prompts=prompts)[layer]
        assert (found - expected).norm() <= tolerance * expected.norm()


def check_refused(
    folder: Path, place: Path, part: str, changes: Mapping[str, Any], words: str, **settings: Any
) -> None:
    """A copy of the model whose part's config is changed so is refused by one line with these words."""
    copy = Path(shutil.copytree(folder, place / "m"))
    path = copy / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=words) as error:
        load_whole(copy, **settings)
    assert "\n" not in str(error.value)


def check_shapes(
    unet: Any, about: Description, call: Callable[[], Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """A U-Net on the meta device, cut here, gives layers of these shapes, as the catalogue has them."""
    cut(unet, about.layers)
    kept, _ = captured({layer: layer_module(unet, layer) for layer in about.layers}, call)
    assert {layer: tuple(output.shape[1:]) for layer, output in kept.items()} == shapes
    for layer, (channels, side, _) in shapes.items():
        assert about.layers[layer] == LayerSpec(channels, about.image_size // side)
