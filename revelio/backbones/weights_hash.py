"""A hash of a backbone's weights, which ties what was computed with them to them."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from revelio.backbones.base import Backbone


def weights_hash(backbone: Backbone) -> str:
    """A hash of every weight the backbone holds, by name, in its number format."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in _modules(backbone, set()):
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
