"""The k-SAE step in numpy, dense, every float32 sum in the order that the native kernel states.

Independent of it: every row is updated at every step (none is skipped, none rests), every score is taken.
"""

import math

import numpy as np
import torch
from torch import Tensor

from revelio.sae.kernels.base import Codes, Gradient, Weights
from revelio.sae.optim import AdamRows, AdamStep, update_vector

F = np.float32


def dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums over the last axis of a * b: element i to lane i % 32, ascending; then the lanes in halves."""
    products = (a * b).astype(F)
    d = products.shape[-1]
    lanes = np.zeros((*products.shape[:-1], 32), F)
    for i in range(d):
        lanes[..., i % 32] += products[..., i]
    half = 16
    while half:
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
        half //= 2
    return lanes[..., 0]


class SameOrderKernel:
    """Dense, a term at a time."""

    def encode(self, centred, weights: Weights, k: int, among=None, k_among: int = 0):
        x, w = centred.numpy(), weights.W_enc.numpy()
        scores = np.stack([dots(row, w) for row in x]) + weights.b_enc.numpy()
        best = _best(scores, k)
        if among is None:
            return best, None
        return best, _best(np.where(among.numpy(), scores, F(-np.inf)), k_among)

    def decode(self, codes: Codes, rows: Tensor) -> Tensor:
        out = np.zeros((len(codes.values), rows.shape[1]), F)
        for c in range(codes.values.shape[1]):
            out += codes.values.numpy()[:, c, None] * rows.numpy()[codes.indices.numpy()[:, c]]
        return torch.from_numpy(out)

    def code_gradients(self, codes: Codes, outputs: Tensor, rows: Tensor) -> Tensor:
        picked = rows.numpy()[codes.indices.numpy()]
        return torch.from_numpy(dots(outputs.numpy()[:, None], picked))

    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        _unit(weights.W_dec.numpy(), moments.last.numpy() > 0)

    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        w_enc, w_dec, last = weights.W_enc.numpy(), weights.W_dec.numpy(), moments.last.numpy()
        latents, order = gradient.latents.sort(stable=True)
        d_enc, d_dec = np.zeros_like(w_enc), np.zeros_like(w_dec)
        for j, e in zip(latents.tolist(), order.tolist(), strict=True):
            d_enc[j] += gradient.gradients.numpy()[e] * gradient.inputs.numpy()[gradient.images[e]]
            row = gradient.outputs.numpy()[gradient.output_rows[e]]
            d_dec[j] += gradient.values.numpy()[e] * row
        d_dec += -dots(d_dec, w_dec)[:, None] * w_dec
        active = np.isin(np.arange(len(last)), latents.numpy())
        enc_moved = _adam(w_enc, d_enc, moments.W_enc, step)
        dec_moved = _adam(w_dec, d_dec, moments.W_dec, step)
        if step.unit_norm:
            _unit(w_dec, active | dec_moved)
        moves = active | ((last > 0) & ((step.t < 15) | enc_moved | dec_moved))
        last[:] = np.where(active, step.t, np.where((last > 0) & ~moves, -step.t, last))
        sums = torch.zeros_like(weights.b_enc).index_add_(0, latents, gradient.gradients[order])
        update_vector(weights.b_enc, sums, moments.b_enc, step)
        update_vector(weights.b_dec, gradient.b_dec, moments.b_dec, step)


def _best(scores: np.ndarray, k: int) -> Codes:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores, order, 1)
    return Codes(torch.from_numpy(values), torch.from_numpy(order))


def _unit(w: np.ndarray, which: np.ndarray) -> None:
    lengths = np.sqrt(dots(w, w))
    which = which & (lengths > 0)
    w[which] /= lengths[which, None]


def _adam(w: np.ndarray, gradient: np.ndarray, moments, step: AdamStep) -> np.ndarray:
    """One Adam step on every row; True for rows of which a bit changed."""
    beta1, beta2 = step.beta1, step.beta2
    rate = F(step.learning_rate / (1 - beta1**step.t))
    root = F(1 / math.sqrt(1 - beta2**step.t))
    mean, square = moments.mean.numpy(), moments.square.numpy()
    mean[:] = F(beta1) * mean + F(1 - beta1) * gradient
    square[:] = F(beta2) * square + F(1 - beta2) * (gradient * gradient)
    moved = w - rate * mean / (np.sqrt(square) * root + F(step.eps))
    changed = (moved != w).any(1)
    w[:] = moved
    return changed
