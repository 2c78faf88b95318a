"""The same interface as :mod:`revelio.sae.kernels.base`, densely and plainly: what the fast path must equal.

For reading and for tests: it makes every (b n) and (n d) matrix that the fast path avoids.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from revelio.sae.kernels.base import Codes, Gradient, Weights
from revelio.sae.optim import AdamRows, AdamStep, Moments


class ReferenceKernel:
    """Dense formulas, one line each."""

    @torch.no_grad()
    def encode(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        among: Bool[Tensor, " n"] | None = None,
        k_among: int = 0,
    ) -> tuple[Codes, Codes | None]:
        """Eq. 3: the k largest of ``W_enc (x - b_pre) + b_enc``."""
        pre = centred @ weights.W_enc.T + weights.b_enc
        best = Codes(*pre.topk(k, dim=1))
        if among is None:
            return best, None
        masked = pre.masked_fill(~among, float("-inf"))
        return best, Codes(*masked.topk(min(k_among, pre.shape[1]), dim=1))

    @torch.no_grad()
    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """Eq. 4 without the bias."""
        return _dense(codes, len(rows)) @ rows

    @torch.no_grad()
    def code_gradients(
        self, codes: Codes, outputs: Float[Tensor, "b d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b k"]:
        """The whole (b n) gradient of the code, of which the kept places are taken."""
        return (outputs @ rows.T).gather(1, codes.indices)

    @torch.no_grad()
    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """Unit length for every row that has moved."""
        _unit(weights.W_dec, moments)

    @torch.no_grad()
    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        """Dense gradients, projection, Adam on everything, unit length for every moving row."""
        n, w = len(weights.b_enc), weights.W_dec
        code = w.new_zeros(len(gradient.outputs), n)
        code.index_put_((gradient.output_rows, gradient.latents), gradient.values, accumulate=True)
        pulls = w.new_zeros(len(gradient.inputs), n)
        pulls.index_put_((gradient.images, gradient.latents), gradient.gradients, accumulate=True)
        d_dec = code.T @ gradient.outputs
        d_dec = d_dec - (d_dec * w).sum(1, keepdim=True) * w
        _adam(weights.W_enc, pulls.T @ gradient.inputs, moments.W_enc, step)
        _adam(weights.W_dec, d_dec, moments.W_dec, step)
        _adam(weights.b_enc, pulls.sum(0), moments.b_enc, step)
        _adam(weights.b_dec, gradient.b_dec, moments.b_dec, step)
        moved = (code != 0).any(0) | (pulls != 0).any(0)
        moments.last.copy_(torch.where(moved, step.t, moments.last))
        if step.unit_norm:
            _unit(w, moments)


def _unit(w: Float[Tensor, "n d"], moments: AdamRows) -> None:
    moving = (moments.last > 0)[:, None]
    w.copy_(torch.where(moving, w / w.norm(dim=1, keepdim=True), w))


def _dense(codes: Codes, n: int) -> Float[Tensor, "b n"]:
    zeros = codes.values.new_zeros(len(codes.values), n)
    # Added up: places of value 0 may only fill up a row and name a latent that stands there already.
    return zeros.scatter_add(1, codes.indices, codes.values)


def _adam(weight: Tensor, gradient: Tensor, moments: Moments, step: AdamStep) -> None:
    mean, square = moments.mean, moments.square
    mean.copy_(step.beta1 * mean + (1 - step.beta1) * gradient)
    square.copy_(step.beta2 * square + (1 - step.beta2) * gradient**2)
    mean_hat = mean / (1 - step.beta1**step.t)
    square_hat = square / (1 - step.beta2**step.t)
    weight -= step.learning_rate * mean_hat / (square_hat.sqrt() + step.eps)
