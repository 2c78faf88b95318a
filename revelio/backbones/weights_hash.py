"""A hash of a backbone's weights, which ties what was computed with them to them."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from revelio.backbones.base import Backbone


def weights_hash(backbone: Backbone) -> str:
    """A hash of every weight the backbone holds, by name, in its number format."""
    return _hash(_modules(backbone, set()))


def pipeline_hash(pipeline: Any) -> str:
    """A hash of every weight and setting of a diffusers pipeline's parts."""
    parts = sorted(pipeline.components.items())
    # The scheduler and diffusers' models say their settings; those of transformers' shape their weights.
    saying = [(name, part) for name, part in parts if hasattr(part, "to_json_string")]
    settings = [f"{name}:{part.to_json_string()}" for name, part in saying]
    weights = _hash((name, part) for name, part in parts if isinstance(part, nn.Module))
    return hashlib.blake2b("\n".join([*settings, weights]).encode(), digest_size=16).hexdigest()


def _hash(modules: Iterable[tuple[str, nn.Module]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, module in modules:
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}.{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(flat.numpy())
    return digest.hexdigest()


def weight_bytes(holder: object) -> int:
    """Bytes of every weight that a backbone, or what is like one, holds."""
    found = {
        id(tensor): tensor.nbytes
        for _, module in _modules(holder, set())
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(found.values())


def _modules(holder: object, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The models among a backbone's attributes and, of its own parts, among theirs."""
    seen.add(id(holder))
    for name, value in sorted(getattr(holder, "__dict__", {}).items()):
        if id(value) in seen:
            continue
        if isinstance(value, nn.Module):
            seen.add(id(value))
            yield name, value
        elif type(value).__module__ == type(holder).__module__ or _is_ours(value):
            yield from ((f"{name}.{inner}", module) for inner, module in _modules(value, seen))


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("revelio.backbones.")
