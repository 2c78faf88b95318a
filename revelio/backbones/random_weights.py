"""A backbone with random weights: what its architecture alone gives, the baseline of training.

The denoiser (or the ViT) is drawn anew from its layers' own default distributions; the VAE and the text
encoder stay as they are, so that the denoiser sees what it would have seen.
"""

from typing import Any

import torch
from torch import nn

from revelio.backbones.base import Backbone
from revelio.backbones.dit import DiTBackbone
from revelio.backbones.registry import load_backbone
from revelio.backbones.stable_diffusion import StableDiffusionBackbone
from revelio.backbones.vit import VitBackbone
from revelio.seeds import key_seed

SCALE = 0.02  # of parameters that belong to no standard layer, such as position embeddings


def untrained(backbone: Backbone, seed: int) -> Backbone:
    """Draw the weights of the backbone's model anew, in place; the name says so.

    Raises:
        ValueError: the backbone is of a kind whose model is not known.
    """
    match backbone:
        case StableDiffusionBackbone():
            _redraw(backbone.unet, seed)
        case DiTBackbone():
            _redraw(backbone.transformer, seed)
        case VitBackbone():
            _redraw(backbone.model, seed)
        case _:
            raise ValueError(
                f"{backbone.name} can't be given random weights: leave --random-weights out"
            )
    backbone.name = f"{backbone.name} (random weights {seed})"
    return backbone


@torch.no_grad()
def _redraw(model: nn.Module, seed: int) -> None:
    # Layers draw from the global generator of the device they are on: lend the CPU's a keyed state.
    with torch.random.fork_rng():
        torch.manual_seed(key_seed(seed, "random weights"))
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            reset = getattr(module, "reset_parameters", None)
            if own and callable(reset):
                reset()
            else:
                for parameter in own:
                    parameter.normal_(std=SCALE)


def load_random_backbone(name: str, seed: int, **settings: Any) -> Backbone:
    """:func:`untrained` of what :func:`~revelio.backbones.registry.load_backbone` gives."""
    return untrained(load_backbone(name, **settings), seed)
