"""One training step: forward, loss, gradient, update, with codes sparse throughout.

Adam at 4e-4 with 500 steps of linear warm-up (Sec. 4.1), decoder rows of unit length, the gradient's
component along them removed. What the modes change:

| mode     | loss                             | unit length             | warm-up of update t |
|----------|----------------------------------|-------------------------|---------------------|
| fixed    | MSE / variance of the whole set  | after the update        | t / 500             |
| as_paper | squared error of a row (Eq. 5)   | after the update        | t / 500             |
| as_code  | MSE / variance of the batch      | before the forward pass | (t + 1) / 500       |

A step of TopK on a CUDA device does not wait for it, with AuxK or without: losses and counts stay there
until somebody reads them (:class:`~revelio.sae.state.StepState`), and an update whose loss is not finite is
left out on the device. What decides how much there is to compute is waited for: how full each prefix's
fullest row is (prefixes, once a step), whether rows may hold more codes than were looked at and how full they
are (BatchTopK and JumpReLU, once a look; there is another where a row is more than twice as full as k).
PyTorch's kernel waits in every step, as do processes that share the latents.

AuxK (Gao et al., 2024) adds ``coefficient * loss(residual, reconstruction of it by dead latents)``, codes
rectified in every mode. Its loss is divided by what the main loss is divided by (the variance of the set;
nothing in `as_paper`), so it fades with the residual. Gao et al. divide it by the variance of the residual
itself, which keeps its weight.
"""

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from revelio.sae.activations import EncodeRequest
from revelio.sae.config import TrainConfig
from revelio.sae.kernels.base import Codes, Gradient, Kernel
from revelio.sae.matryoshka import Nested
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.optim import AdamStep
from revelio.sae.state import StepState, TrainState, not_finite

Take = Callable[[Tensor, AdamStep, "int | Tensor"], Tensor]


class Replay(Protocol):
    """Takes steps by having recorded one."""

    def bound(self, take: Take) -> Take:
        """``take``, recorded or plain."""
        ...


def learning_rate(model: KSparseAutoencoder, config: TrainConfig, t: int) -> float:
    """Update t's learning rate (t from 1). The released code's scheduler is one step ahead."""
    ahead = 1 if model.mode == "as_code" else 0
    share = min(1.0, (t + ahead) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay:
        share *= min(1.0, (config.steps + 1 - t) / (config.decay * config.steps))
    return config.learning_rate * share


class _Loss(NamedTuple):
    """Numbers of shape () in float64, on the model's device."""

    loss: Tensor
    scale: Tensor
    fvu: Tensor


def _loss(model: KSparseAutoencoder, x: Tensor, error: Tensor, state: TrainState) -> _Loss:
    """The loss, and the factor that makes its gradient out of the error."""
    # By columns first: such sums do not depend on the number of threads.
    spread_of_batch = (x - x.mean(0)).square_().mean(0).mean()
    mse = error.square().mean(0).mean()
    fvu = (mse / spread_of_batch).double()
    if model.mode == "as_paper":
        return _Loss((mse * model.d).double(), torch.full_like(fvu, 2 / len(x)), fvu)
    if model.mode == "as_code":
        scale = 2 / (error.numel() * spread_of_batch.double())
        equal_rows = fvu.isnan() & mse.isfinite()  # the released code's NaN -> 0
        return _Loss(fvu.masked_fill(equal_rows, 0.0), scale.masked_fill(equal_rows, 0.0), fvu)
    divisor = torch.full_like(fvu, state.variance)
    return _Loss(mse.double() / divisor, 2 / (error.numel() * divisor), fvu)


@torch.no_grad()
def train_step(
    model: KSparseAutoencoder,
    batch: Float[Tensor, "b d"],
    config: TrainConfig,
    state: TrainState,
    kernel: Kernel,
    replay: Replay | None = None,
) -> StepState:
    """One update of all weights, in place.

    Args:
        model: what is trained.
        batch: rows, on any device.
        config: of the training.
        state: where it stands; changed in place.
        kernel: how the heavy parts are computed.
        replay: takes the step in place of a plain call, such as a recorded CUDA graph.

    Raises:
        ValueError: rows of another width, or a loss that is not finite (no weight is updated then); on a
            CUDA device the latter is raised when the step's numbers are read.
    """
    t = state.step + 1
    rate = learning_rate(model, config, t)
    adam = AdamStep(t, rate, unit_norm=model.mode != "as_code")
    x = batch.to(model.b_dec.device, torch.float32, non_blocking=True)

    def take(x: Tensor, adam: AdamStep, samples: int | Tensor) -> Tensor:
        return _take(model, x, config, state, kernel, adam, samples)

    samples = state.samples + len(x)
    numbers = (take if replay is None else replay.bound(take))(x, adam, samples)
    state.step, state.samples = t, samples
    state.window_sum += numbers[0] if numbers.is_cuda else numbers[0].item()
    return StepState(
        step=t,
        epoch=state.epoch,
        samples=samples,
        learning_rate=rate,
        state=state,
        numbers=numbers,
        config=config,
    )


def _take(
    model: KSparseAutoencoder,
    x: Float[Tensor, "b d"],
    config: TrainConfig,
    state: TrainState,
    kernel: Kernel,
    adam: AdamStep,
    samples: int | Tensor,
) -> Float64[Tensor, "6"]:
    """The step on the model's device; gives :class:`StepState`'s numbers. ``samples``: rows seen with it."""
    weights = model.weights
    if model.mode == "as_code":
        kernel.unit_norm(weights, state.moments)
    centred = model.centre(x)
    rule = model.rule(state.threshold, config.bandwidth * sqrt(state.variance), config.sparsity)
    try:
        output = rule.keep(_request(model, centred, config, state, kernel))
    except ValueError as error:
        raise ValueError(not_finite(adam.t, config, str(error))) from error
    codes, dead, _ = output
    nested = Nested.of(codes, model.prefixes)
    errors = [(part + weights.b_dec).sub_(x) for part in nested.decoded(kernel, weights.W_dec)]
    losses = [_loss(model, x, error, state) for error in errors]
    error, (_, scale, fvu) = errors[-1], losses[-1]
    loss = torch.stack([each.loss for each in losses]).mean()
    share = 1 / len(losses)
    scaled = [e * (at.scale * share) for e, at in zip(errors, losses, strict=True)]
    outputs = nested.outputs(scaled)
    grads = [
        _grads(model, *part, kernel, model.rectifies)
        for part in zip(nested.parts, outputs, strict=True)
    ]
    parts = list(grads)
    auxk_loss = torch.zeros_like(loss)
    if dead is not None:
        auxk_loss, of_dead = _auxk(model, dead, error, config.auxk_coefficient * scale, kernel)
        parts.append(of_dead)
    del errors, error  # as large as the batch, and not needed by what follows
    adam = replace(adam, go=_finite(loss + auxk_loss, adam, config, state))
    gradient = _gradient(model, centred, parts, kernel)
    kernel.update(weights, state.moments, gradient, adam)
    rule.learn(output, nested.joined([part.raw for part in grads]), adam)
    active = codes.values != 0
    seen = torch.where(active, samples, 0)
    state.fired_at.scatter_reduce_(0, codes.indices.flatten(), seen.flatten(), "amax")
    idle = samples - state.fired_at
    dead_share = (idle >= config.dead_after).double().mean()
    numbers = [loss, auxk_loss, fvu, active.sum() / len(x), (idle == 0).sum(), dead_share]
    return torch.stack([number.double() for number in numbers])


def _finite(loss: Tensor, adam: AdamStep, config: TrainConfig, state: TrainState) -> Tensor | None:
    """Refuse a loss that is not finite: at once on a CPU; on CUDA by a flag that leaves updates out."""
    if not loss.is_cuda:
        if not bool(loss.isfinite()):
            raise ValueError(not_finite(adam.t, config, f"it is {loss.item()}"))
        return None
    if state.broken is None:
        state.broken = torch.zeros((), dtype=torch.int64, device=loss.device)
    t = adam.t if adam.clock is None else adam.clock[0].to(torch.int64)
    # The first bad step's number stays: no later update is made either.
    state.broken += torch.where((state.broken == 0) & ~loss.isfinite(), t, 0)
    return state.broken == 0


def _auxk(
    model: KSparseAutoencoder, dead: Codes, error: Tensor, factor: Tensor, kernel: Kernel
) -> "tuple[Tensor, _Grads]":
    """The loss of dead latents that reconstruct the residual, and their share of the gradient."""
    left = kernel.decode(dead, model.weights.W_dec) + error
    grads = _grads(model, dead, left * factor, kernel, rectified=True)
    return left.square().sum().double() * factor / 2, grads


def _dead(state: TrainState, config: TrainConfig) -> Tensor:
    return state.samples - state.fired_at >= config.dead_after


def _request(
    model: KSparseAutoencoder,
    centred: Tensor,
    config: TrainConfig,
    state: TrainState,
    kernel: Kernel,
) -> EncodeRequest:
    # None can be dead yet: nothing to ask the device for.
    may_be = config.auxk and state.samples >= config.dead_after
    among = _dead(state, config) if may_be else None
    k_dead = 0 if among is None else min(config.auxk, _count(among))
    return EncodeRequest(kernel, centred, model.weights, among if k_dead else None, k_dead)


def _count(dead: Tensor) -> int:
    """How many latents are dead; on CUDA the most there can be, so that nobody waits: codes beyond are 0."""
    return len(dead) if dead.is_cuda else int(dead.sum())


class _Grads(NamedTuple):
    """Codes with the gradients of their values and of what they decode to.

    ``raw`` gradients are of values as if every code given were active.
    """

    codes: Codes
    gradients: Float[Tensor, "b k"]
    outputs: Float[Tensor, "b d"]
    raw: Float[Tensor, "b k"]


def _grads(
    model: KSparseAutoencoder, codes: Codes, outputs: Tensor, kernel: Kernel, rectified: bool
) -> _Grads:
    raw = kernel.code_gradients(codes, outputs, model.weights.W_dec)
    gradients = raw * (codes.values > 0) if rectified else raw
    return _Grads(codes, gradients, outputs, raw)


def _gradient(
    model: KSparseAutoencoder, centred: Tensor, parts: list[_Grads], kernel: Kernel
) -> Gradient:
    """All terms of the gradient; AuxK's outputs stand below the reconstruction's.

    Only the first part reaches b_pre through the decoder: AuxK reconstructs the residual without it.
    """
    b = len(centred)
    images = [torch.arange(b, device=centred.device).repeat_interleave(p.codes.indices.shape[1])
              for p in parts]  # fmt: skip
    values = torch.cat([p.codes.values.flatten() for p in parts])
    gradients = torch.cat([p.gradients.flatten() for p in parts])
    latents = torch.cat([p.codes.indices.flatten() for p in parts])
    output_rows = torch.cat([rows + i * b for i, rows in enumerate(images)])
    image_rows = torch.cat(images)
    b_dec = parts[0].outputs.sum(0)
    for part in parts:
        through = Codes(part.gradients, part.codes.indices)
        b_dec -= kernel.decode(through, model.weights.W_enc).sum(0)
    outputs = torch.cat([p.outputs for p in parts]) if len(parts) > 1 else parts[0].outputs
    return Gradient(latents, image_rows, output_rows, values, gradients, centred, outputs, b_dec)
