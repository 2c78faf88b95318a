# pyright: reportIndexIssue=false
"""The CUDA kernel: :class:`~revelio.sae.kernels.base.Kernel` in Triton, without a host synchronisation.

Encoding is a search that is exact in float32, by a float16 copy of ``W_enc`` and a bound of each latent's
score's error: :mod:`revelio.sae.kernels.cuda_search` and, where that is faster, with the selection within the
product, :mod:`revelio.sae.kernels.cuda_within`. Copy and bounds are kept up to date for every row that an
update changes.

The update is one program a latent: the
sums of its gradient's terms in the order of the images (those of a latent with many terms in blocks that
other programs have added), projection, Adam, unit length, and the row's float16 copy. It leaves rows alone
that cannot change (:mod:`revelio.sae.optim`). No number is added atomically, so the same inputs give the same
bits.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from revelio.sae.kernels import cuda_programs as programs
from revelio.sae.kernels.base import Codes, Gradient, Weights, writes
from revelio.sae.kernels.cuda_search import (
    FUSED,
    AfterProduct,
    HalfCopy,
    Query,
    empty_codes,
    float32_sums,
    row_options,
    tile_options,
)
from revelio.sae.kernels.cuda_within import How, Nomination
from revelio.sae.optim import FIRST_REST, REST_EVERY, AdamRows, AdamStep

# A latent's terms are added in blocks of so many, each by a program of its own: where a latent fires on
# thousands of images, one program would still run long after all others have ended.
TERMS = 64


def clock(step: AdamStep, device: torch.device, samples: int = 0) -> Float64[Tensor, "5"]:
    """What changes from step to step, on the device: t, rate, root, whether to look for rest, rows seen."""
    rate = step.learning_rate / (1 - step.beta1**step.t)
    root = (1 - step.beta2**step.t) ** 0.5
    looking = step.t >= FIRST_REST and step.t % REST_EVERY == 0
    told = torch.tensor([step.t, rate, root, looking, samples], dtype=torch.float64)
    # From pinned memory, so that the host does not wait.
    told = told.pin_memory() if device.type == "cuda" else told
    return told.to(device, non_blocking=True)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's (`cuda:1`)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class CudaKernel:
    """See :class:`~revelio.sae.kernels.base.Kernel`; weights, inputs and moments are float32, on CUDA.

    A kernel keeps a float16 copy of one model's ``W_enc`` and renews it with every update it makes; after
    writes by PyTorch, such as another optimizer's, it is made anew.

    Args:
        nomination: whether the best latents are selected after the product that nominates them, within it,
            or in whichever way is faster.
    """

    def __init__(self, nomination: How = "auto") -> None:
        self.nomination = Nomination(nomination)
        self._copy: HalfCopy | None = None

    @torch.no_grad()
    def encode(
        self,
        centred: Float[Tensor, "b d"],
        weights: Weights,
        k: int,
        among: Bool[Tensor, " n"] | None = None,
        k_among: int = 0,
    ) -> tuple[Codes, Codes | None]:
        """See :class:`~revelio.sae.kernels.base.Kernel`; larger first, ties to the lower index."""
        best, mask = empty_codes(centred, min(k, len(weights.W_enc))), None
        others = None
        if among is not None:
            mask = among.to(torch.uint8)
            others = empty_codes(centred, min(k_among, len(weights.W_enc)))
        if not len(centred):
            return best, others
        with on_device_of(centred), float32_sums():
            copy, x = self._copied(weights.W_enc), centred.contiguous()
            query = Query.of(copy, x, weights.b_enc)
            if others is None:
                self.nomination.fill(query, best)
            else:  # both from the same scores
                AfterProduct(query, self.nomination.buffer).fill((best, None), (others, mask))
        return best, others

    @torch.no_grad()
    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        (b, k), d = codes.values.shape, rows.shape[1]
        out = torch.empty(b, d, device=rows.device)
        values, indices = codes.values.contiguous(), codes.indices.contiguous()
        if b:
            with on_device_of(out):
                programs.decode[(b,)](values, indices, rows, out, d, k, **tile_options(d, k))
        return out

    @torch.no_grad()
    def code_gradients(
        self, codes: Codes, outputs: Float[Tensor, "b d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b k"]:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        (b, k), d = codes.values.shape, rows.shape[1]
        out = torch.empty(b, k, device=rows.device)
        if b:
            outputs, indices = outputs.contiguous(), codes.indices.contiguous()
            with on_device_of(out):
                programs.products[(b,)](outputs, indices, rows, out, d, k, **tile_options(d, k))
        return out

    @torch.no_grad()
    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        n, d = weights.W_dec.shape
        with on_device_of(weights.W_dec):
            programs.unit_norm[(n,)](weights.W_dec, moments.last, d, **row_options(d))

    @torch.no_grad()
    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        with on_device_of(weights.W_enc):
            self._update(weights, moments, gradient, step)

    def _update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        n, d = weights.W_enc.shape
        copy = self._copied(weights.W_enc)
        # What only fills up rows is of latent 0, whose program would run long after all others: such terms go
        # behind the last latent, each a latent of its own, and nobody adds them.
        fills = (gradient.values == 0) & (gradient.gradients == 0)
        beyond = torch.arange(n, n + len(fills), device=fills.device)
        latents = torch.where(fills, beyond, gradient.latents).to(torch.int32)
        latents, order = latents.sort(stable=True)
        edges = torch.arange(n + 1, device=latents.device, dtype=torch.int32)
        starts = torch.searchsorted(latents, edges, out_int32=True)
        d_b_enc = torch.zeros_like(weights.b_enc)
        go = latents.new_ones(1) if step.go is None else step.go.to(torch.int32)
        now = clock(step, weights.W_enc.device) if step.clock is None else step.clock
        betas = (step.beta1, step.beta2, step.eps)
        terms = (
            *(gradient.images[order], gradient.output_rows[order]),
            *(gradient.gradients[order], gradient.values[order]),
            *(gradient.inputs.contiguous(), gradient.outputs.contiguous()),
        )
        sums = _block_sums(latents, terms, d)
        programs.update[(n,)](
            *(weights.W_enc, weights.W_dec, moments.W_enc.mean, moments.W_enc.square),
            *(moments.W_dec.mean, moments.W_dec.square, moments.last),
            *(copy.half, copy.bounds, starts, *terms, d_b_enc),
            *(*sums, go, now, *betas, d),
            UNIT=step.unit_norm,
            TERMS=TERMS,
            **row_options(d),
        )
        for vector, gradients, kept in (
            (weights.b_enc, d_b_enc, moments.b_enc),
            (weights.b_dec, gradient.b_dec, moments.b_dec),
        ):
            programs.vector[(triton.cdiv(len(vector), 1024),)](
                *(vector, gradients, kept.mean, kept.square, go, now, len(vector), *betas),
                BLOCK=1024,
                **FUSED,
            )

    @property
    def holds(self) -> object | None:
        """The copy: another object once it was made anew, whose address a recorded graph does not know."""
        return self._copy

    def _copied(self, W_enc: Float[Tensor, "n d"]) -> HalfCopy:
        """The copy of these weights, made at their first use."""
        held = self._copy
        now = (W_enc.data_ptr(), writes(W_enc))
        if held is not None and (held.source.data_ptr(), held.writes) == now:
            return held
        self._copy = None
        n, d = W_enc.shape
        half = torch.empty(n, d, dtype=torch.float16, device=W_enc.device)
        bounds = torch.empty(n, dtype=torch.float16, device=W_enc.device)
        programs.bounds_of[(n,)](W_enc, half, bounds, d, **row_options(d))
        self._copy = HalfCopy(W_enc, writes(W_enc), half, bounds)
        return self._copy


def _block_sums(latents: Tensor, terms: tuple[Tensor, ...], d: int) -> tuple[Tensor, ...]:
    """The gradients' sums of each whole block of terms of one latent; the others' are not set."""
    blocks, device = len(latents) // TERMS, latents.device
    enc, dec = (torch.empty(blocks, d, device=device) for _ in range(2))
    bias = torch.empty(blocks, device=device)
    counts = torch.empty(blocks, dtype=torch.int32, device=device)
    if blocks:
        programs.sum_blocks[(blocks,)](
            latents, *terms, enc, dec, bias, counts, d, TERMS=TERMS, **row_options(d)
        )
    return enc, dec, bias, counts
