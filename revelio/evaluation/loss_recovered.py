"""Loss recovered: how much of a layer's work for the denoiser survives when it passes through a k-SAE.

At timestep t the model's own denoising loss |prediction - target|^2 is taken with the layer's activation as
it is (L_true), with its pooled part or its cells replaced by the reconstruction (L_sae), by the mean
activation (L_mean) and by zero (L_zero):

    loss recovered = (L_mean - L_sae) / (L_mean - L_true)

1 for a perfect reconstruction, 0 for the mean. A k-SAE of pooled activations knows one vector an image: the
layer's spatial mean is replaced and each cell keeps its deviation from it. One of cells replaces each cell.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from revelio.analysis.paired import Measured, measured
from revelio.backbones.base import DiffusionModel
from revelio.backbones.diffusion.schedule import keyed_noise
from revelio.backbones.hooks import edit, hooked
from revelio.sae.inputs import Source
from revelio.sae.model import KSparseAutoencoder

Replace = Callable[[Float[Tensor, "r d"]], Float[Tensor, "r d"]]


def reconstruction(model: KSparseAutoencoder, source: Source = None) -> Replace:
    """Activations (r d) as the k-SAE reconstructs them."""
    return lambda rows: model.decode(model.encode(rows, source), source).to(rows)


def denoising_losses(
    backbone: DiffusionModel,
    layer: str,
    encoded: Float[Tensor, "b c h w"],
    ids: Sequence[str],
    timestep: int,
    replacements: Mapping[str, Replace | None],
    *,
    cells: bool = False,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Float[Tensor, " b"]]:
    """Each image's squared error of the prediction, with the layer replaced in each way.

    Args:
        backbone: loaded whole.
        layer: whose activation is replaced.
        encoded: what ``backbone.encode`` gave.
        ids: the images' ids, which key the noise: all replacements see the same.
        timestep: the model's training index.
        replacements: by name: a function of activations (r d); None leaves the layer as it is.
        cells: replace every cell, not the spatial mean.
        prompts: a text an image; None: the empty prompt.
        seed: of the noise.

    Raises:
        ValueError: the model was cut when it was loaded.
    """
    noise = keyed_noise(encoded.shape[1:], ids, seed=seed, timestep=timestep, draw=0)
    device = next(backbone.module(layer).parameters()).device
    clean, noise = encoded.to(device, torch.float32), noise.to(device)
    x_t = backbone.schedule.add_noise(clean, noise, timestep)
    target = backbone.schedule.target(clean, noise, timestep)
    conditioning = backbone.conditioning([""] * len(ids) if prompts is None else prompts)
    losses = {}
    with torch.no_grad():
        for name, replace in replacements.items():
            hooks = {} if replace is None else {layer: edit(_replaced(replace, cells))}
            with hooked(backbone, hooks):
                output = backbone.predict(x_t, timestep, conditioning).float()
            # Learned-variance models append channels that are no prediction.
            error = output[:, : target.shape[1]] - target
            losses[name] = error.double().square().mean((1, 2, 3)).cpu()
    return losses


def _replaced(replace: Replace, cells: bool) -> Callable[[Tensor], Tensor]:
    def function(output: Tensor) -> Tensor:
        # A grid (b d h w) of a U-Net, tokens (b t d) of a transformer.
        rows = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
        rows = rows.float()
        if cells:
            made = replace(rows.flatten(0, 1)).view_as(rows)
        else:
            mean = rows.mean(1)
            made = rows + (replace(mean) - mean)[:, None]
        return made.transpose(1, 2).reshape(output.shape) if output.ndim == 4 else made

    return function


def loss_recovered(
    losses: Mapping[str, Float[Tensor, " b"]], name: str, subsets: Bool[Tensor, "subsets b"]
) -> Measured:
    """The share recovered by ``losses[name]``; ``true`` and ``mean`` are the ends of the scale."""
    gained = losses["mean"] - losses[name]
    whole = losses["mean"] - losses["true"]
    return measured(lambda kept: float(gained[kept].sum() / whole[kept].sum()), subsets)


def summary(losses: Mapping[str, Float[Tensor, " b"]]) -> dict[str, Any]:
    """The mean loss by name."""
    return {name: float(values.mean()) for name, values in losses.items()}
