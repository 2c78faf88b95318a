"""A backbone with random weights: what its architecture alone gives, the baseline of training.

The denoiser (or the ViT) is drawn anew from its layers' own default distributions; the VAE and the text
encoder stay as they are, so that the denoiser sees what it would have seen.
"""

from typing import Any

import torch
from torch import nn

from revelio.backbones.base import Backbone
from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import load_backbone
from revelio.seeds import key_seed, lent

SCALE = 0.02  # of parameters that belong to no standard layer, such as position embeddings


def untrained(backbone: Backbone, seed: int) -> Backbone:
    """Draw the weights of the backbone's model anew, in place; the name says so.

    Raises:
        ValueError: a backbone of a user's own that has no ``network``.
    """
    _redraw(network_of(backbone), seed)
    backbone.name = f"{backbone.name} (random weights {seed})"
    return backbone


def network_of(backbone: Backbone) -> nn.Module:
    """The denoiser or the ViT of a backbone.

    Raises:
        ValueError: a backbone of a user's own that has no ``network``.
    """
    network = getattr(backbone, "network", None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{backbone.name} can't be given random weights: its network is not known")
    return network


@torch.no_grad()
def _redraw(model: nn.Module, seed: int) -> None:
    # Layers draw from the global generator of the device they are on: on the CPU, so that devices agree.
    place = next(model.parameters()).device
    model.to("cpu")
    with lent(key_seed(seed, "random weights")):
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            reset = getattr(module, "reset_parameters", None)
            if own and callable(reset):
                reset()
            else:
                for parameter in own:
                    parameter.normal_(std=SCALE)
    model.to(place)


def load_random_backbone(model: str | BackboneConfig, seed: int, **settings: Any) -> Backbone:
    """:func:`untrained` of what :func:`~revelio.backbones.registry.load_backbone` gives."""
    return untrained(load_backbone(model, **settings), seed)
