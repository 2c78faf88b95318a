"""Gradients of sparse codes, so that a k-SAE learns in anybody's own PyTorch loop.

Of the chosen latents S of a row, z_j = W_enc_j (x - b_pre) + b_enc_j is linear in the parameters; which
latents are chosen has no gradient. Codes come from the kernel; what follows from them is k rows an image, in
both directions an embedding bag. :mod:`revelio.sae.step` has the same sums without autograd, and trains
faster: no gradient is as large as a matrix there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from revelio.sae.kernels.base import Codes

THRESHOLDS_FIXED = (
    "the thresholds of a JumpReLU k-SAE are learnt by revelio.train alone, and would stay as they are: "
    "train there, or call eval() on the k-SAE to learn its weights at these thresholds"
)


class _Values(torch.autograd.Function):
    """Values that a kernel computed, as functions of the activations and of the encoder."""

    @staticmethod
    def forward(
        ctx: Any, centred: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, indices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(centred, W_enc, b_enc, values, indices)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        centred, W_enc, b_enc, values, indices = ctx.saved_tensors
        # What a ReLU or a threshold cut off, and what only fills up a row, is 0 and follows nothing.
        gradient = (gradient * (values != 0)).contiguous()
        of_rows = of_b = None
        with torch.enable_grad():
            rows = W_enc.detach().requires_grad_()
            of_centred = _bags(indices, rows, gradient)
        if ctx.needs_input_grad[1]:
            # d(sum of gradient * z) / dW_enc is what the bag's own rows get from `centred`.
            (of_rows,) = torch.autograd.grad(of_centred, rows, centred)
        if ctx.needs_input_grad[2]:
            of_b = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), gradient.flatten())
        return of_centred.detach(), of_rows, of_b, None, None


def with_gradients(
    codes: Codes, centred: Float[Tensor, "b d"], W_enc: Float[Tensor, "n d"], b_enc: Tensor
) -> Codes:
    """The same codes, their values differentiable in the activations and the encoder."""
    return Codes(_Values.apply(centred, W_enc, b_enc, *codes), codes.indices)  # pyright: ignore


def decoded(codes: Codes, W_dec: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
    """What :meth:`Kernel.decode` gives, differentiable in the values and the decoder."""
    return _bags(codes.indices, W_dec, codes.values.to(W_dec.dtype))


def refuse_thresholds(gradient: Tensor) -> Tensor:
    """A hook for codes of a JumpReLU k-SAE in training.

    Raises:
        ValueError: always.
    """
    raise ValueError(THRESHOLDS_FIXED)


def _bags(
    indices: Int64[Tensor, "b k"], rows: Float[Tensor, "n d"], values: Float[Tensor, "b k"]
) -> Float[Tensor, "b d"]:
    return F.embedding_bag(indices, rows, mode="sum", per_sample_weights=values)
