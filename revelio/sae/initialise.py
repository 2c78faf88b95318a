"""How a k-SAE's weights begin, by mode.

| mode             | W_dec                                    | W_enc                            |
|------------------|------------------------------------------|----------------------------------|
| fixed, as_paper  | random directions of unit length         | W_dec, in `fixed` scaled         |
| as_code          | kaiming-uniform, fan d, then unit length | kaiming-uniform, fan n, its own  |

The tied start is Gao et al.'s (2024), whom the paper follows; `fixed` scales it by the one factor that
reconstructs the first activations best. b_enc is zero; b_dec is the mean or the geometric median of
the first activations. A k-SAE that was just made has seen none: its scale is 1 and its b_dec zero.
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.kernel import Codes

if TYPE_CHECKING:
    from revelio.sae.model import KSparseAutoencoder

PreBias = Literal["mean", "geometric_median"]


@torch.no_grad()
def initialise(
    model: "KSparseAutoencoder",
    activations: Float[Tensor, "b d"],
    generator: torch.Generator,
    pre_bias: PreBias = "mean",
) -> None:
    """Fill all weights in place, from the generator and from a first set of activations."""
    x = activations.to(model.b_dec.device, torch.float32)
    median = pre_bias == "geometric_median" and model.mode != "as_code"
    draw_weights(model, generator)
    model.b_dec.copy_(geometric_median(x) if median else x.mean(0))
    if model.mode == "fixed":
        model.W_enc.data.mul_(best_scale(model, x))


@torch.no_grad()
def draw_weights(model: "KSparseAutoencoder", generator: torch.Generator) -> None:
    """Fill both matrices as the table says, of scale 1, and set both biases to zero; in place."""
    model.b_dec.zero_()
    model.b_enc.zero_()
    # The decoder's fan is d, so its bound is that of `kaiming_uniform_` with gain sqrt(2).
    _uniform(model, model.W_dec.data, math.sqrt(6 / model.d), generator)
    model.W_dec /= torch.linalg.vector_norm(model.W_dec, dim=1, keepdim=True)
    if model.mode == "as_code":
        _uniform(model, model.W_enc.data, math.sqrt(6 / model.n), generator)
    else:
        model.W_enc.copy_(model.W_dec)


@torch.no_grad()
def best_scale(model: "KSparseAutoencoder", x: Float[Tensor, "b d"]) -> float:
    """The factor on the codes that makes the squared error of ``x`` least; 1 if there is none."""
    centred = model.centre(x)
    # TopK whatever the activation is: thresholds are yet to be found.
    codes, _ = model.kernel.encode(centred, model.weights, model.k)
    kept = codes.values.clamp(min=0) if model.rectifies else codes.values
    guess = model.decode(Codes(kept, codes.indices)) - model.b_dec
    power = float((guess * guess).sum())
    scale = float((guess * centred).sum()) / power if power > 0 else 1.0
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def geometric_median(
    x: Float[Tensor, "b d"], steps: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration."""
    middle = x.mean(0)
    for _ in range(steps):
        near = (x - middle).norm(dim=1).clamp_(min=1e-12)
        weights = (1 / near) / (1 / near).sum()
        moved = weights @ x
        change = (moved - middle).norm() / middle.norm().clamp(min=1e-12)
        middle = moved
        if change < tolerance:
            break
    return middle


def _uniform(
    model: "KSparseAutoencoder", matrix: Tensor, bound: float, generator: torch.Generator
) -> None:
    # Drawn on the CPU, some rows at a time, so that every device starts alike without a second matrix;
    # a process that holds some of the latents draws them all and keeps its own.
    held, step = model.held, 4096
    for first in range(0, model.n, step):
        drawn = torch.empty(min(step, model.n - first), model.d, device="cpu")
        drawn.uniform_(-bound, bound, generator=generator)
        start, stop = max(first, held.start), min(first + step, held.stop)
        if start < stop:
            matrix[start - held.start : stop - held.start] = drawn[start - first : stop - first]
