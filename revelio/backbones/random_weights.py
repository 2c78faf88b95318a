"""The same architecture with random weights: what a layer's grids are worth before any training."""

from typing import Any

import torch
from torch import nn

from revelio.backbones.base import Backbone
from revelio.backbones.registry import load_backbone
from revelio.seeds import key_seed


def load_random_backbone(name: str, seed: int, **settings: Any) -> Backbone:
    """Load a backbone and draw its network's weights anew; VAE, text encoder and schedule stay.

    Args:
        name: what :func:`~revelio.backbones.registry.load_backbone` takes.
        seed: of the weights.
        settings: of :func:`~revelio.backbones.registry.load_backbone`.

    Raises:
        ValueError: a model of a user's own, whose network isn't known.
    """
    from revelio.backbones.dit import DiTBackbone
    from revelio.backbones.stable_diffusion import StableDiffusionBackbone
    from revelio.backbones.vit import VitBackbone

    backbone = load_backbone(name, **settings)
    if isinstance(backbone, StableDiffusionBackbone):
        randomise(backbone.unet, seed)
    elif isinstance(backbone, DiTBackbone):
        randomise(backbone.transformer, seed)
    elif isinstance(backbone, VitBackbone):
        randomise(backbone.model, seed)
    else:
        raise ValueError(f"{name} is registered by its user: its network's weights aren't known")
    return backbone


def randomise(network: nn.Module, seed: int) -> None:
    """Draw all weights as torch's own layers do at first; embeddings held as bare parameters ~ N(0, 0.02).

    The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(key_seed(seed, "random weights"))
        for module in network.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(std=0.02)
