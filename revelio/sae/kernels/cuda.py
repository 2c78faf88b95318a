# pyright: reportIndexIssue=false
"""The CUDA kernel: :class:`~revelio.sae.kernels.base.Kernel` in Triton, without a host synchronisation.

Encoding is a search in three parts, exact in float32:

1. Nomination. One float16 tensor-core product of the (scaled) activations and a float16 copy of ``W_enc``
   gives approximate scores ``a``, a chunk of images at a time.
2. Selection. With ``eps`` a bound of a score's error, the k-th largest of ``a - eps`` is below the k-th best
   exact score, so every latent of the exact top k has an ``a + eps`` of at least that. The k-th largest of
   disjoint groups' maxima is a lower bound of it that one pass finds.
3. Rescoring. The candidates, a few more than k, are scored in float32; the k best are kept, ties going to the
   lower index. Candidates that do not fit are found anew, some at a time.

The bound is Cauchy-Schwarz on the two rounding errors, plus what accumulating in float32 can lose:

    |x w - x~ w~| <= |x - x~| |w| + |x~| |w - w~| + d 2^-22 |x| |w| <= e(x) m(w)

    e(x) = |x - x~| + 2^-12 |x~| + d 2^-22 |x|,   m(w) = max(|w|, 2^12 |w - w~|)

with ``m(w)`` kept up to date for every row that an update changes. The update is one program a latent: the
sums of its gradient's terms in the order of the images (those of a latent with many terms in blocks that
other programs have added), projection, Adam, unit length, and the row's float16 copy. It leaves rows alone
that cannot change (:mod:`revelio.sae.optim`). Nothing is added atomically, so the same inputs give the same
bits.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
from jaxtyping import Bool, Float, Float16, Float64
from torch import Tensor

from revelio.sae.kernels import cuda_programs as programs
from revelio.sae.kernels.base import Codes, Gradient, Weights, writes
from revelio.sae.optim import FIRST_REST, REST_EVERY, AdamRows, AdamStep

# Approximate scores held at once: 96 MiB in float16.
BUFFER = 48 << 20
# Scores stay below this after scaling, half of what float16 holds at most.
LARGEST = 2.0**14
# The most latents an image that are chosen by candidates; more (AuxK) take whole products.
MOST = 256
# How many candidates an image has room for. A k-SAE that has learned leaves more of them than a fresh one.
WIDE = 512
# Disjoint groups of latents, at least, whose maxima give a bound of the k-th best score.
GROUPS = 2048
# An image with more of them has at least so many scored at a time: one by one would take ages.
RESCUED = 32
# How many of their weights a program holds at once; more of them spill out of its registers.
RESCUED_TILE = 2048
# A latent's terms are added in blocks of so many, each by a program of its own: where a latent fires on
# thousands of images, one program would still run long after all others have ended.
TERMS = 64
# Compiled with fused multiply-adds, whatever Triton's default or TRITON_DEFAULT_FP_FUSION is (3.9 warns where
# it isn't told): the same bits from every version. No bound presumes a product that is rounded by itself.
FUSED = {"enable_fp_fusion": True}
# PyTorch's settings that let a product on CUDA add with less than float32.
ROUNDING = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")


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


@contextmanager
def _float32_sums() -> Iterator[None]:
    """What the bound presumes of products: otherwise cuBLAS may add parts in float16, or round to TF32."""
    matmul: Any = torch.backends.cuda.matmul
    # What an older PyTorch has no name for it does not do.
    before = {name: getattr(matmul, name) for name in ROUNDING if hasattr(matmul, name)}
    exact: dict[str, Any] = dict.fromkeys(before, False)
    try:
        before["allow_tf32"], exact["allow_tf32"] = matmul.allow_tf32, False
    except RuntimeError:  # set by PyTorch's newer names, which the older one can't be mixed with
        before["fp32_precision"], exact["fp32_precision"] = matmul.fp32_precision, "ieee"
    try:
        for name, value in exact.items():
            setattr(matmul, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


class _Copy(NamedTuple):
    """The float16 copy of ``W_enc``; ``source`` is held so that its address stays its own."""

    source: Tensor
    writes: int | None
    half: Float16[Tensor, "n d"]
    bounds: Float16[Tensor, " n"]


class CudaKernel:
    """See :class:`~revelio.sae.kernels.base.Kernel`; weights, inputs and moments are float32, on CUDA.

    A kernel keeps a float16 copy of one model's ``W_enc`` and renews it with every update it makes; after
    writes by PyTorch, such as another optimizer's, it is made anew.

    Args:
        buffer: approximate scores held at once.
    """

    def __init__(self, buffer: int = BUFFER) -> None:
        self.buffer = buffer
        self._copy: _Copy | None = None

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
        best, mask = _empty(centred, min(k, len(weights.W_enc))), None
        others = None
        if among is not None:
            mask = among.to(torch.uint8)
            others = _empty(centred, min(k_among, len(weights.W_enc)))
        if not len(centred):
            return best, others
        with on_device_of(centred), _float32_sums():
            copy, x = self._copied(weights.W_enc), centred.contiguous()
            search = _Search(copy, x, weights.b_enc, self.buffer)
            for rows in search.chunks():
                scores = search.scores(rows)
                search.keep(best, scores, rows, None)
                if others is not None:
                    search.keep(others, scores, rows, mask)
        return best, others

    @torch.no_grad()
    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        (b, k), d = codes.values.shape, rows.shape[1]
        out = torch.empty(b, d, device=rows.device)
        values, indices = codes.values.contiguous(), codes.indices.contiguous()
        if b:
            with on_device_of(out):
                programs.decode[(b,)](values, indices, rows, out, d, k, **_tile(d, k))
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
                programs.products[(b,)](outputs, indices, rows, out, d, k, **_tile(d, k))
        return out

    @torch.no_grad()
    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """See :class:`~revelio.sae.kernels.base.Kernel`."""
        n, d = weights.W_dec.shape
        with on_device_of(weights.W_dec):
            programs.unit_norm[(n,)](weights.W_dec, moments.last, d, **_row(d))

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
            **_row(d),
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

    def _copied(self, W_enc: Float[Tensor, "n d"]) -> _Copy:
        """The copy of these weights, made at their first use."""
        held = self._copy
        now = (W_enc.data_ptr(), writes(W_enc))
        if held is not None and (held.source.data_ptr(), held.writes) == now:
            return held
        self._copy = None
        n, d = W_enc.shape
        half = torch.empty(n, d, dtype=torch.float16, device=W_enc.device)
        bounds = torch.empty(n, dtype=torch.float16, device=W_enc.device)
        programs.bounds_of[(n,)](W_enc, half, bounds, d, **_row(d))
        self._copy = _Copy(W_enc, writes(W_enc), half, bounds)
        return self._copy


class _Search:
    """The best latents of a batch; see the module's text."""

    def __init__(self, copy: _Copy, x: Float[Tensor, "b d"], b_enc: Tensor, buffer: int) -> None:
        (b, d), n = x.shape, len(copy.half)
        self.x, self.copy, self.b_enc, self.n = x, copy, b_enc, n
        self.size = max(1, min(b, buffer // n // 128 * 128 or buffer // n))
        tiny = torch.finfo(torch.float32).tiny
        bias = b_enc.abs().max()
        x_norms = torch.linalg.vector_norm(x, dim=1)
        bound = copy.bounds.max().float()
        largest = x_norms.max() * bound.clamp(min=1) + bias
        # A power of two, so that scaling rounds nothing.
        scale = torch.exp2(
            torch.floor(torch.log2(LARGEST / largest.clamp(min=tiny))).clamp(-60, 60)
        )
        self.scale = scale.reshape(1)
        self.half = torch.empty(b, d, dtype=torch.float16, device=x.device)
        norms, errors = torch.empty(b, device=x.device), torch.empty(b, device=x.device)
        programs.halve[(b,)](x, self.scale, self.half, norms, errors, d, **_row(d))
        eps = (errors + 2.0**-12 * (norms + errors) + d * 2.0**-22 * norms) * 1.001
        # A row of W_enc that float16 does not hold has no score: nothing is certain then.
        self.eps = torch.where(bound.isfinite(), eps, float("inf"))
        # The bias is rounded to float16, too.
        self.slack = (2.0**-11 * bias * scale + 1e-6).reshape(1)
        self.bias = (b_enc * scale).half()

    def chunks(self) -> list[slice]:
        return [slice(i, min(i + self.size, len(self.x))) for i in range(0, len(self.x), self.size)]

    def scores(self, rows: slice) -> Float16[Tensor, "c n"]:
        return torch.addmm(self.bias, self.half[rows], self.copy.half.T)

    def keep(self, best: Codes, scores: Tensor, rows: slice, among: Tensor | None) -> None:
        """Write the exact best latents of these rows (of those in ``among``) into ``best``."""
        k = best.values.shape[1]
        x, count = self.x[rows], len(scores)
        if k == 0:
            return
        if k > MOST:
            self._plainly(best, x, rows, among)
            return
        wide = triton.next_power_of_2(max(WIDE, 2 * k))
        floors = torch.empty(count, device=x.device)
        candidates = torch.empty(count, wide, dtype=torch.int32, device=x.device)
        found = torch.zeros(count, dtype=torch.int32, device=x.device)
        mask = among if among is not None else found
        groups = triton.next_power_of_2(max(GROUPS, 8 * k))
        programs.select[(count,)](
            *(scores, self.eps[rows], self.slack, self.copy.bounds),
            *(mask, candidates, found, floors, self.n, k),
            MASKED=among is not None,
            GROUPS=groups,
            WIDE=wide,
            num_warps=8,
            **FUSED,
        )
        exact = torch.empty(count, wide, device=x.device)
        d, weight = x.shape[1], self.copy.source
        programs.rescore[(count,)](
            *(x, weight, self.b_enc, candidates, found, exact, d), WIDE=wide, **_tile(d, wide)
        )
        values, indices = best.values[rows], best.indices[rows]
        kept = triton.next_power_of_2(max(k, RESCUED))
        programs.pick[(count,)](
            exact, candidates, found, values, indices, k, WIDE=wide, num_warps=4, **FUSED
        )
        programs.rescue[(count,)](
            *(x, weight, self.b_enc, scores, self.eps[rows], self.copy.bounds, floors),
            *(mask, found, values, indices, self.n, d, k),
            MASKED=among is not None,
            WIDE=wide,
            KEPT=kept,
            BLOCK=min(64, RESCUED_TILE // kept),
            num_warps=4 if kept <= 64 else 8,
            **FUSED,
        )

    def _plainly(self, best: Codes, x: Tensor, rows: slice, among: Tensor | None) -> None:
        scores = torch.addmm(self.b_enc, x, self.copy.source.T)
        if among is not None:
            scores.masked_fill_(among == 0, float("-inf"))
        found = scores.topk(best.values.shape[1], dim=1)
        best.values[rows], best.indices[rows] = found.values, found.indices


def _empty(x: Tensor, k: int) -> Codes:
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    return Codes(torch.empty(len(x), k, device=x.device), indices)


def _block_sums(latents: Tensor, terms: tuple[Tensor, ...], d: int) -> tuple[Tensor, ...]:
    """The gradients' sums of each whole block of terms of one latent; the others' are not set."""
    blocks, device = len(latents) // TERMS, latents.device
    enc, dec = (torch.empty(blocks, d, device=device) for _ in range(2))
    bias = torch.empty(blocks, device=device)
    counts = torch.empty(blocks, dtype=torch.int32, device=device)
    if blocks:
        programs.sum_blocks[(blocks,)](
            latents, *terms, enc, dec, bias, counts, d, TERMS=TERMS, **_row(d)
        )
    return enc, dec, bias, counts


def _row(d: int) -> dict[str, Any]:
    """How a program holds one row of width d."""
    block = triton.next_power_of_2(d)
    return {"D": block, "num_warps": 8 if block >= 2048 else 4 if block >= 512 else 1} | FUSED


def _tile(d: int, k: int) -> dict[str, Any]:
    """How a program holds some rows of width d at once."""
    return {"ROWS": min(4, triton.next_power_of_2(k))} | _row(d)
