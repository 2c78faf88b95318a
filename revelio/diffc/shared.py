"""Several processes train one Diff-C: each takes its share of every batch, and all take the same step.

    mean, variance of a batch norm: from all processes' sums;  gradient: the sum of the shares' gradients

A batch is what it would be in one process, dropout included, so that the training is, too: but for the order
in which floats are added.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

_share: ContextVar["_Part | None"] = ContextVar("_share", default=None)


@dataclass(frozen=True)
class Share:
    """This process's part of the work: number ``rank`` of ``world``; of one of one it is all."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> slice:
        """The places that are this process's, of so many."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up what each process's part of a batch gave, in one exchange."""
        if self.world == 1:
            return
        found = [p.grad for p in model.parameters() if p.grad is not None]
        flat = self.sum_(torch.cat([gradient.flatten() for gradient in found]))
        for gradient, part in zip(found, flat.split([g.numel() for g in found]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, part: Float[Tensor, "p c"], count: int) -> Float[Tensor, "n c"]:
        """All processes' rows, of which ``part`` are those of :meth:`of`."""
        if self.world == 1:
            return part
        whole = part.new_zeros(count, *part.shape[1:])
        whole[self.of(count)] = part
        return self.sum_(whole)


@dataclass(frozen=True)
class _Part:
    share: Share
    whole: int  # images of the batch


@contextmanager
def part_of(share: Share, whole: int) -> Iterator[None]:
    """Inside, what a Diff-C in training is given is this process's share of so many images."""
    token = _share.set(_Part(share, whole) if share.world > 1 else None)
    try:
        yield
    finally:
        _share.reset(token)


def mean_loss(logits: Float[Tensor, "b c"], labels: Int64[Tensor, " b"]) -> Tensor:
    """The cross-entropy over the whole batch, or this share's part of it."""
    part = _share.get()
    if part is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / part.whole


class BatchNorm2d(nn.BatchNorm2d):
    """By the whole batch's moments where processes share it (PyTorch's own for that is for CUDA alone)."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """See :class:`torch.nn.BatchNorm2d`."""
        part = _share.get()
        if part is None or not self.training:
            return super().forward(input)
        count = part.whole * input.shape[2] * input.shape[3]
        mean = _Sum.apply(input.sum((0, 2, 3)), part.share) / count
        centred = input - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3)), part.share) / count
        self._remember(mean.detach(), variance.detach() * count / max(count - 1, 1))
        out = centred * (variance + self.eps).rsqrt()[:, None, None]
        if not self.affine:
            return out
        return out * self.weight[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class _Sum(torch.autograd.Function):
    """The sum over all processes, each of whose losses depends on it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, share: Share) -> Tensor:
        ctx.share = share
        return share.sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.share.sum_(gradients[0].clone()), None


class Dropout(nn.Dropout):
    """The whole batch's mask is drawn, so that an image's part does not depend on who has it."""

    def forward(self, input: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """See :class:`torch.nn.Dropout`."""
        return _dropped(self, input, super().forward)


class Dropout2d(nn.Dropout2d):
    """See :class:`Dropout`."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """See :class:`torch.nn.Dropout2d`."""
        return _dropped(self, input, super().forward)


def _dropped(module: nn.Dropout | nn.Dropout2d, input: Tensor, plain: Any) -> Tensor:
    part = _share.get()
    if part is None or not module.training or module.p == 0:
        return plain(input)
    # Of every channel as a whole, where it has a height and a width.
    ones = input.new_ones(part.whole, input.shape[1], *[1] * (input.ndim - 2))
    return input * plain(ones)[part.share.of(part.whole)]
