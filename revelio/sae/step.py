"""One training step: forward, loss, gradient, update, with codes sparse throughout.

Adam at 4e-4 with 500 steps of linear warm-up (Sec. 4.1), decoder rows of unit length, the gradient's
component along them removed. What the modes change:

| mode     | loss                             | unit length             | warm-up of update t |
|----------|----------------------------------|-------------------------|---------------------|
| fixed    | MSE / variance of the whole set  | after the update        | t / 500             |
| as_paper | squared error of a row (Eq. 5)   | after the update        | t / 500             |
| as_code  | MSE / variance of the batch      | before the forward pass | (t + 1) / 500       |

AuxK (Gao et al., 2024) adds ``coefficient * loss(residual, reconstruction of it by dead latents)``, codes
rectified in every mode. Its loss is divided by what the main loss is divided by (the variance of the set;
nothing in `as_paper`), so it fades with the residual. Gao et al. divide it by the variance of the residual
itself, which keeps its weight.
"""

from math import isfinite, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.activation import Asked
from revelio.sae.adam import AdamStep
from revelio.sae.kernel import Codes, Gradient, Kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.prefixes import Nested
from revelio.sae.state import StepState, TrainSettings, TrainState


def learning_rate(model: KSparseAutoencoder, settings: TrainSettings, t: int) -> float:
    """Update t's learning rate (t from 1). The released code's scheduler is one step ahead."""
    if settings.warmup_steps == 0:
        return settings.learning_rate
    ahead = 1 if model.mode == "as_code" else 0
    return settings.learning_rate * min(1.0, (t + ahead) / settings.warmup_steps)


class _Loss(NamedTuple):
    loss: float
    scale: float
    fvu: float


def _loss(model: KSparseAutoencoder, x: Tensor, error: Tensor, state: TrainState) -> _Loss:
    """The loss, and the factor that makes its gradient out of the error."""
    # By columns first: such sums do not depend on the number of threads.
    spread_of_batch = (x - x.mean(0)).square().mean(0).mean()
    mse = error.square().mean(0).mean()
    fvu = float(mse / spread_of_batch)
    if model.mode == "as_paper":
        return _Loss(float(mse * model.d), 2 / len(x), fvu)
    divisor = float(spread_of_batch) if model.mode == "as_code" else state.variance
    loss = float(mse / spread_of_batch) if model.mode == "as_code" else float(mse) / divisor
    if model.mode == "as_code" and loss != loss and bool(error.isfinite().all()):
        return _Loss(0.0, 0.0, fvu)  # the released code's NaN -> 0
    return _Loss(loss, 2 / (error.numel() * divisor) if divisor else float("nan"), fvu)


def train_step(
    model: KSparseAutoencoder,
    batch: Float[Tensor, "b d"],
    settings: TrainSettings,
    state: TrainState,
    kernel: Kernel,
) -> StepState:
    """One update of all weights, in place.

    Raises:
        ValueError: rows of another width, or a loss that is not finite (no weight is updated then).
    """
    weights, t = model.weights, state.step + 1
    if model.mode == "as_code":
        kernel.unit_norm(weights, state.moments)
    centred = model.centre(batch)
    x = batch.to(centred.device, torch.float32)
    rule = model.rule(state.threshold, settings.bandwidth * sqrt(state.variance), settings.sparsity)
    try:
        kept = rule.keep(_asked(model, centred, settings, state, kernel))
    except ValueError as error:
        raise ValueError(_remedy(t, settings, str(error))) from error
    codes, dead, _ = kept
    nested = Nested.of(codes, model.prefixes)
    errors = [part + weights.b_dec - x for part in nested.decoded(kernel, weights.W_dec)]
    losses = [_loss(model, x, error, state) for error in errors]
    error, (_, scale, fvu) = errors[-1], losses[-1]
    loss = sum(each.loss for each in losses) / len(losses)
    share = 1 / len(losses)
    scaled = [e * (at.scale * share) for e, at in zip(errors, losses, strict=True)]
    outputs = nested.outputs(scaled)
    pulls = [
        _pull(model, *part, kernel, model.rectifies)
        for part in zip(nested.parts, outputs, strict=True)
    ]
    parts = list(pulls)
    auxk_loss = 0.0
    if dead is not None:
        auxk_loss, pull = _auxk(model, dead, error, settings.auxk_coefficient * scale, kernel)
        parts.append(pull)
    if not isfinite(loss + auxk_loss):
        of_auxk = f", AuxK's part {auxk_loss}" if settings.auxk else ""
        raise ValueError(_remedy(t, settings, f"it is {loss}{of_auxk}"))
    gradient = _gradient(model, centred, parts, kernel)
    rate = learning_rate(model, settings, t)
    adam = AdamStep(t, rate, unit_norm=model.mode != "as_code")
    kernel.update(weights, state.moments, gradient, adam)
    rule.learn(kept, nested.joined([pull.raw for pull in pulls]), adam)
    state.step, state.samples = t, state.samples + len(x)
    state.window_sum += loss
    fired = codes.indices[codes.values != 0]
    state.fired_at[fired] = state.samples
    return StepState(
        step=t,
        epoch=state.epoch,
        samples=state.samples,
        loss=loss,
        auxk_loss=auxk_loss,
        fvu=fvu,
        l0=len(fired) / len(x),
        active=int((state.fired_at == state.samples).sum()),
        dead_share=float(_dead(state, settings).double().mean()),
        learning_rate=rate,
        state=state,
    )


def _remedy(t: int, settings: TrainSettings, why: str) -> str:
    return (
        f"the loss of step {t} is not finite ({why}): look for NaN or equal rows in the activations, or "
        f"lower learning_rate (it is {settings.learning_rate:g})"
    )


def _auxk(
    model: KSparseAutoencoder, dead: Codes, error: Tensor, factor: float, kernel: Kernel
) -> "tuple[float, _Pull]":
    """The loss of dead latents that reconstruct the residual, and their share of the gradient."""
    left = kernel.decode(dead, model.weights.W_dec) + error
    pull = _pull(model, dead, left * factor, kernel, rectified=True)
    return float(left.square().sum()) * factor / 2, pull


def _dead(state: TrainState, settings: TrainSettings) -> Tensor:
    return state.samples - state.fired_at >= settings.dead_after


def _asked(
    model: KSparseAutoencoder,
    centred: Tensor,
    settings: TrainSettings,
    state: TrainState,
    kernel: Kernel,
) -> Asked:
    among = _dead(state, settings) if settings.auxk else None
    k_dead = min(settings.auxk, int(among.sum())) if among is not None else 0
    return Asked(kernel, centred, model.weights, among if k_dead else None, k_dead)


class _Pull(NamedTuple):
    """Codes with the gradients of their values and of what they decode to.

    ``raw`` gradients are of values as if every code given were active.
    """

    codes: Codes
    gradients: Float[Tensor, "b k"]
    outputs: Float[Tensor, "b d"]
    raw: Float[Tensor, "b k"]


def _pull(
    model: KSparseAutoencoder, codes: Codes, outputs: Tensor, kernel: Kernel, rectified: bool
) -> _Pull:
    raw = kernel.code_gradients(codes, outputs, model.weights.W_dec)
    gradients = raw * (codes.values > 0) if rectified else raw
    return _Pull(codes, gradients, outputs, raw)


def _gradient(
    model: KSparseAutoencoder, centred: Tensor, parts: list[_Pull], kernel: Kernel
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
    if model.rectifies or len(parts) > 1:
        keep = (values > 0) if model.rectifies else (values != 0) | (gradients != 0)
        latents, image_rows, output_rows = latents[keep], image_rows[keep], output_rows[keep]
        values, gradients = values[keep], gradients[keep]
    return Gradient(latents, image_rows, output_rows, values, gradients, centred, outputs, b_dec)
