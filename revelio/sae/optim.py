"""Adam over the rows of a k-SAE's two matrices, touching only rows that can change.

Exactly the dense update (Kingma and Ba, Algorithm 1, no weight decay), because

- a row that was never active has zero moments and a zero gradient: its update is 0 / (0 + eps) = 0;
- an idle row with live moments still moves, so it is still updated, with a zero gradient;
- an idle row whose update changed no bit is at rest: from step 15 on its updates only shrink
  (by 0.9 / sqrt(0.999) a step, faster than warm-up and bias correction can grow them), so it is left
  alone until it is active again; its moments then catch up on the decay that they missed.

Only rows that moved are scaled back to unit length, so a row at rest stays bit for bit what it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# An idle row's zero-gradient update shrinks from here on; see the module's text.
FIRST_REST = 15
# How often idle rows are looked at: finding one at rest a few steps late costs only time.
REST_EVERY = 16
# A block is updated where it lies, without a copy of its moving rows, if these exceed the rows at rest by
# more than this share of it: rows at rest are set back afterwards, so each of them costs a copy instead.
IN_PLACE_SHARE = 0.25


@dataclass(frozen=True)
class AdamStep:
    """What one update needs to know: its number t (from 1), its learning rate, the constants.

    Where ``go`` is False, on the device, nothing is changed, neither by a kernel nor by what learns beside
    it; None is True. ``clock`` holds t and what follows from it on the device, for a step that is replayed;
    the CUDA kernel alone reads it.
    """

    t: int
    learning_rate: float
    unit_norm: bool = True
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    go: Tensor | None = None
    clock: Tensor | None = None


@dataclass(frozen=True)
class Moments:
    """Running means of one parameter's gradient and of its square."""

    mean: Tensor
    square: Tensor

    @classmethod
    def like(cls, parameter: Tensor) -> "Moments":
        """Zero moments."""
        return cls(torch.zeros_like(parameter.data), torch.zeros_like(parameter.data))


@dataclass(frozen=True)
class AdamRows:
    """The optimiser's state.

    Attributes:
        W_enc: the encoder's moments, a latent a row; likewise the others.
        last: a latent's state: 0 never active, positive: moving, -t: at rest since step t.
    """

    W_enc: Moments
    W_dec: Moments
    b_enc: Moments
    b_dec: Moments
    last: Int64[Tensor, " n"]

    @classmethod
    def start(cls, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor) -> "AdamRows":
        """The state before the first step."""
        moments = (Moments.like(parameter) for parameter in (W_enc, W_dec, b_enc, b_dec))
        return cls(*moments, last=torch.zeros_like(b_enc.data, dtype=torch.int64))

    def wake(self, active: Int64[Tensor, " a"], step: AdamStep) -> None:
        """Mark the rows active in this step as moving; let the moments of resting ones catch up."""
        last = self.last[active]
        resting = last < 0
        rows = active[resting]
        if len(rows):
            missed = (step.t - 1 + last[resting]).to(torch.float64)
            for moments in (self.W_enc, self.W_dec):
                _scale_rows(moments.mean, rows, step.beta1**missed)
                _scale_rows(moments.square, rows, step.beta2**missed)
        self.last[active] = step.t

    def blocks(self, size: int) -> Iterator["RowBlock"]:
        """The moving rows, in ascending blocks of at most ``size``."""
        moving, resting = (self.last > 0).nonzero()[:, 0], (self.last < 0).nonzero()[:, 0]
        n = len(self.last)
        edges = torch.arange(0, n + size, size, device=moving.device).clamp_(max=n)
        both = torch.stack([torch.searchsorted(rows, edges) for rows in (moving, resting)])
        counts, rests = both.tolist()
        pending: list[Tensor] = []
        for index, (first, end) in enumerate(pairwise(counts)):
            start, stop = index * size, min(index * size + size, n)
            still = resting[rests[index] : rests[index + 1]]
            if end - first - len(still) > IN_PLACE_SHARE * (stop - start):
                yield from self._gathered(pending, size)
                pending = []
                rows = torch.arange(start, stop, device=moving.device)
                yield RowBlock(self, rows, start, still)
            elif end > first:
                pending.append(moving[first:end])
        yield from self._gathered(pending, size)

    def _gathered(self, pending: list[Tensor], size: int) -> Iterator["RowBlock"]:
        if pending:
            for rows in torch.cat(pending).split(size):
                yield RowBlock(self, rows, None, rows[:0])


@dataclass(frozen=True)
class RowBlock:
    """Rows to update together: a slice from ``start`` on, or, if that is None, any ``rows``.

    A slice may hold rows that never were active, whose update is zero, and rows at rest (``resting``), which
    are set back to what they were: their moments decay when they wake, once and for all missed steps.
    """

    state: AdamRows
    rows: Int64[Tensor, " r"]
    start: int | None
    resting: Int64[Tensor, " s"]

    def update(
        self,
        W_enc: Float[Tensor, "n d"],
        W_dec: Float[Tensor, "n d"],
        d_enc: Float[Tensor, "r d"],
        d_dec: Float[Tensor, "r d"],
        step: AdamStep,
    ) -> None:
        """Project the decoder's gradient, take the Adam step, restore unit length; all in place."""
        last = self.state.last[self.rows]
        looking = step.t >= FIRST_REST and step.t % REST_EVERY == 0
        idle = (last > 0) & ((d_enc == 0).all(1) & (d_dec == 0).all(1)) if looking else None
        enc = _Part(self, W_enc, self.state.W_enc)
        dec = _Part(self, W_dec, self.state.W_dec)
        d_dec.addcmul_((d_dec * dec.weight).sum(1, keepdim=True), dec.weight, value=-1)
        still = enc.step(d_enc, step, idle)
        also_still = dec.step(d_dec, step, idle)
        if step.unit_norm:
            moving = last > 0
            if idle is not None:
                moving &= ~(idle & also_still)
            _unit(dec.weight, moving)
        enc.write_back()
        dec.write_back()
        self._record(last, idle & still & also_still if idle is not None else None, step.t)

    def unit_norm(self, matrix: Float[Tensor, "n d"]) -> None:
        """Scale the block's moving rows of ``matrix`` to unit length, in place."""
        moving = self.state.last[self.rows] > 0
        if self.start is None:
            part = matrix.index_select(0, self.rows)
            matrix.index_copy_(0, self.rows, _unit(part, moving))
        else:
            _unit(matrix.narrow(0, self.start, len(self.rows)), moving)

    def _record(self, last: Tensor, rested: Tensor | None, t: int) -> None:
        if rested is not None:
            self.state.last[self.rows] = torch.where(rested, -t, last)


class _Part:
    """A block's share of one matrix and of its moments: views of a slice, copies of picked rows."""

    def __init__(self, block: RowBlock, matrix: Tensor, moments: Moments) -> None:
        self.whole = [matrix, moments.mean, moments.square]
        # Written back in the end: picked rows as updated, a slice's rows at rest as they were.
        self.copied = block.rows if block.start is None else block.resting
        self.copies = [whole.index_select(0, self.copied) for whole in self.whole]
        self.parts = self.copies
        if block.start is not None:
            self.parts = [whole.narrow(0, block.start, len(block.rows)) for whole in self.whole]

    @property
    def weight(self) -> Tensor:
        return self.parts[0]

    def step(self, gradient: Tensor, step: AdamStep, idle: Tensor | None) -> Tensor:
        """Take the step; True for rows that no bit changed of (looked at only if ``idle`` is given)."""
        before = self.weight.clone() if idle is not None else None
        _adam(self.weight, gradient, self.parts[1], self.parts[2], step)
        if before is None:
            return torch.zeros(0, dtype=torch.bool)
        return (self.weight == before).all(1)

    def write_back(self) -> None:
        for whole, copy in zip(self.whole, self.copies, strict=True):
            whole.index_copy_(0, self.copied, copy)


def update_vector(vector: Tensor, gradient: Tensor, moments: Moments, step: AdamStep) -> None:
    """Adam on a bias, whole and in place; not where ``step.go`` is False, for which no host waits."""
    _adam(vector, gradient, moments.mean, moments.square, step)


def _adam(weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: AdamStep) -> None:
    # A gradient that some number of is not finite leaves all as it was: what `GradScaler` has this for.
    found = None if step.go is None else (step.go == 0).float()
    # What `Adam(fused=True)` calls, without its per-call checks and imports: a block has to be cheap.
    torch.ops.aten._fused_adam_(
        [weight],
        [gradient],
        [mean],
        [square],
        [],
        # Filled there: a copy would make the host wait.
        [torch.full((), float(step.t), device=weight.device)],
        lr=step.learning_rate,
        beta1=step.beta1,
        beta2=step.beta2,
        weight_decay=0.0,
        eps=step.eps,
        amsgrad=False,
        maximize=False,
        found_inf=found,
    )


def _unit(rows: Tensor, which: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(rows, dim=1)
    rows /= torch.where(which, length, torch.ones_like(length))[:, None]
    return rows


def _scale_rows(matrix: Tensor, rows: Tensor, factors: Tensor) -> None:
    scaled = matrix.index_select(0, rows).mul_(factors.to(matrix.dtype)[:, None])
    matrix.index_copy_(0, rows, scaled)
