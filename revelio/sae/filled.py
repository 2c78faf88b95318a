"""Tensors of an imported file, checked, in a k-SAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.model import KSparseAutoencoder


def take(state: Any, names: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, in float32.

    Raises:
        ValueError: some are missing, or are not floating-point numbers.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds no state_dict: is it a k-SAE?")
    held = {name: state.get(name) for name in names}
    wrong = [
        name for name, t in held.items() if not isinstance(t, Tensor) or not t.is_floating_point()
    ]
    if wrong:
        raise ValueError(f"{path} lacks {', '.join(wrong)}: is it a k-SAE of this format?")
    return {name: state[name].float() for name in names}


@torch.no_grad()
def filled(
    path: Path,
    settings: Mapping[str, Any],
    W_enc: Float[Tensor, "n d"],
    b_enc: Float[Tensor, " n"],
    W_dec: Float[Tensor, "n d"],
    b_dec: Float[Tensor, " d"],
) -> KSparseAutoencoder:
    """A k-SAE with these weights.

    Args:
        path: what they are from, for messages and provenance.
        settings: further arguments of :class:`KSparseAutoencoder`.
        W_enc: the encoder, a latent a row.
        b_enc: its bias.
        W_dec: the decoder, a latent a row.
        b_dec: b_pre.

    Raises:
        ValueError: shapes do not match, or weights are not finite.
    """
    if W_enc.ndim != 2 or W_enc.shape != W_dec.shape:
        raise ValueError(
            f"{path}: encoder {tuple(W_enc.shape)} and decoder {tuple(W_dec.shape)} do not match"
        )
    n, d = W_enc.shape
    if b_enc.shape != (n,) or b_dec.shape != (d,):
        raise ValueError(f"{path}: biases {tuple(b_enc.shape)}, {tuple(b_dec.shape)} do not match")
    if not all(bool(part.isfinite().all()) for part in (W_enc, b_enc, W_dec, b_dec)):
        raise ValueError(f"{path} holds NaN or infinity: the file is damaged")
    model = KSparseAutoencoder(d, n, trained_on={"imported_from": path.name}, seed=None, **settings)
    model.W_enc.copy_(W_enc)
    model.b_enc.copy_(b_enc)
    model.W_dec.copy_(W_dec)
    model.b_dec.copy_(b_dec)
    return model
