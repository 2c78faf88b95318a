"""Convolutions that give the same numbers with any number of threads.

PyTorch's CPU kernels share a sum (a convolution's gradients, a batch norm's moments) out among the threads
that there are, so that its rounding depends on their number, and after some hundred steps a whole training
does. Inside :func:`fixed_order` a batch is always cut into the same parts, of which each is computed by one
thread; what the parts give is added in their order. How many parts depends on the sizes alone: a small
convolution is one part, which the calling thread computes. The convolutions are nearly all of the work: the
rest is done by one thread.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Barrier
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PARTS = 4  # more are slower on few cores: each part lays the weights out anew
# Multiply-adds that a part has at least: fewer take less time than to hand them to a thread.
PART_MACS = 2**25
_pool: ContextVar[ThreadPoolExecutor | None] = ContextVar("_pool", default=None)


@contextmanager
def fixed_order(device: torch.device) -> Iterator[None]:
    """Inside, what a Diff-C on the CPU computes does not depend on the number of threads."""
    if device.type != "cpu":
        yield
        return
    count = torch.get_num_threads()
    token = _pool.set(_threads(count))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
        _pool.reset(token)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    """So many threads, each of which computes alone."""
    every = Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        every.wait()

    pool = ThreadPoolExecutor(count, "diffc", initializer=begin)
    for _ in range(count):
        pool.submit(bool)  # with each, a thread begins
    every.wait()
    torch.set_num_threads(count)  # what was set last holds for threads to come
    return pool


def _forget() -> None:
    """Threads do not live on in a forked process: it starts its own."""
    _threads.cache_clear()
    _pool.set(None)


if hasattr(os, "register_at_fork"):  # not on every system
    os.register_at_fork(after_in_child=_forget)


class Conv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1, in parts inside :func:`fixed_order`."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b o h2 w2"]:
        """See :class:`torch.nn.Conv2d`."""
        pool = _pool.get()
        if pool is None:
            return super().forward(input)
        return _Convolution.apply(input, self.weight, self.bias, self.stride, pool)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        pool: ThreadPoolExecutor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.pool = stride, pool
        ctx.parts = _parts(x, weight, stride)
        if ctx.parts == 1:
            return F.conv2d(x, weight, bias, stride, 1)
        parts = x.chunk(ctx.parts)
        return torch.cat(
            list(pool.map(lambda part: F.conv2d(part, weight, bias, stride, 1), parts))
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (found,), (x, weight), stride = gradients, ctx.saved_tensors, ctx.stride
        wanted = [ctx.needs_input_grad[0], True, True]

        def part(inputs: Tensor, outputs: Tensor) -> Sequence[Tensor]:
            return torch.ops.aten.convolution_backward(
                outputs,
                inputs,
                weight,
                [len(weight)],
                stride,
                [1, 1],
                [1, 1],
                False,
                [0, 0],
                1,
                wanted,
            )

        if ctx.parts == 1:
            return *part(x, found), None, None
        parts = list(ctx.pool.map(part, x.chunk(ctx.parts), found.chunk(ctx.parts)))
        before = torch.cat([one[0] for one in parts]) if wanted[0] else None
        return before, _sum([one[1] for one in parts]), _sum([one[2] for one in parts]), None, None


def _parts(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> int:
    """Into how many parts a batch is cut."""
    macs = weight.numel() * x[:, 0].numel() // (stride[0] * stride[1])
    return max(1, min(PARTS, macs // PART_MACS))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for one in parts[1:]:
        total += one
    return total
