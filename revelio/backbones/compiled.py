"""Compiling the heavy parts of a backbone with ``torch.compile``: on a GPU fewer, fused kernels a batch.

The VAE's encoder is compiled as a whole, the network block by block. Hooks sit on whole blocks, outside what
is compiled, so that reading other layers compiles nothing anew; equal blocks share what was compiled. Each
batch size is compiled at its first batch, for some seconds to a minute. Results differ from uncompiled ones
by rounding, so stores record it.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn

from revelio.backbones.base import Backbone


def compile_backbone(backbone: Backbone) -> None:
    """Have the backbone's parts compiled at their first batch, in place.

    Raises:
        ValueError: the backbone has no parts that are known.
    """
    parts = list(_parts(backbone))
    if not parts:
        raise ValueError(f"{backbone.name} has no parts that can be compiled: leave compile off")
    for part in parts:
        part.forward = _compiled(part.forward)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    run = torch.compile(forward, dynamic=False)

    @wraps(forward)
    def quiet(*given: Any, **named: Any) -> Any:
        with warnings.catch_warnings():
            # What the compiler says of diffusers' own code, while it reads that, is for their authors.
            warnings.filterwarnings(
                "ignore", message="Dynamo detected a call to a `functools.lru_cache`"
            )
            return run(*given, **named)

    return quiet


def _parts(backbone: Any) -> Iterator[nn.Module]:
    encoder = getattr(getattr(getattr(backbone, "latents", None), "vae", None), "encoder", None)
    if isinstance(encoder, nn.Module):
        yield encoder
    network = getattr(backbone, "network", None)
    if isinstance(network, nn.Module):
        yield from _blocks(network)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks of a network: what its lists hold, and a U-Net's middle."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name == "mid_block":
            yield child
        else:
            yield from _blocks(child)
