# pyright: reportIndexIssue=false
"""The exact best latents of a batch on CUDA, selected after the product that nominates them.

Three parts, exact in float32:

1. Nomination. One float16 tensor-core product of the (scaled) activations and a float16 copy of ``W_enc``
   gives approximate scores ``a``, a chunk of images at a time.
2. Selection. With ``eps`` a bound of a score's error, the k-th largest of ``a - eps`` is below the k-th best
   exact score, so every latent of the exact top k has an ``a + eps`` of at least that. The k-th largest of
   disjoint groups' maxima is a lower bound of it that one pass finds.
3. Rescoring. The candidates, a few more than k, are scored in float32; the k best are kept, ties going to the
   lower index. Where they do not fit, the best are found anew first, some at a time.

The bound is Cauchy-Schwarz on the two rounding errors, plus what accumulating in float32 can lose:

    |x w - x~ w~| <= |x - x~| |w| + |x~| |w - w~| + d 2^-22 |x| |w| <= e(x) m(w)

    e(x) = |x - x~| + 2^-12 |x~| + d 2^-22 |x|,   m(w) = max(|w|, 2^12 |w - w~|)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Float16
from torch import Tensor

from revelio.sae.kernels import cuda_programs as programs
from revelio.sae.kernels.base import Codes

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
# How many more than k of those are rescored: sums in another order may put another latent k-th.
BESIDE = 8
# How many of their weights a program holds at once; more of them spill out of its registers.
RESCUED_TILE = 2048
# Compiled with fused multiply-adds, whatever Triton's default or TRITON_DEFAULT_FP_FUSION is (3.9 warns where
# it isn't told): the same bits from every version. No bound presumes a product that is rounded by itself.
FUSED = {"enable_fp_fusion": True}
# PyTorch's settings that let a product on CUDA add with less than float32.
ROUNDING = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")


@contextmanager
def float32_sums() -> Iterator[None]:
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


class HalfCopy(NamedTuple):
    """The float16 copy of ``W_enc``; ``source`` is held so that its address stays its own."""

    source: Tensor
    writes: int | None
    half: Float16[Tensor, "n d"]
    bounds: Float16[Tensor, " n"]


@dataclass(frozen=True)
class Query:
    """A batch's rows as the search wants them, with bounds of what rounding them to float16 does to a score.

    Attributes:
        x: the rows.
        b_enc: the encoder's bias.
        copy: of the encoder's rows.
        half: the rows times a power of two, which rounds nothing, in float16.
        eps: a bound of a scaled score's error for a latent whose bound is 1; infinite where there is none.
        bias: the encoder's bias, scaled.
    """

    x: Float[Tensor, "b d"]
    b_enc: Float[Tensor, " n"]
    copy: HalfCopy
    half: Float16[Tensor, "b d"]
    eps: Float[Tensor, " b"]
    bias: Float[Tensor, " n"]

    @classmethod
    def of(cls, copy: HalfCopy, x: Float[Tensor, "b d"], b_enc: Float[Tensor, " n"]) -> "Query":
        """Scale and round a batch's rows."""
        b, d = x.shape
        tiny = torch.finfo(torch.float32).tiny
        bias = b_enc.abs().max()
        x_norms = torch.linalg.vector_norm(x, dim=1)
        bound = copy.bounds.max().float()
        largest = x_norms.max() * bound.clamp(min=1) + bias
        # A power of two, so that scaling rounds nothing.
        scale = torch.exp2(
            torch.floor(torch.log2(LARGEST / largest.clamp(min=tiny))).clamp(-60, 60)
        )
        half = torch.empty(b, d, dtype=torch.float16, device=x.device)
        norms, errors = torch.empty(b, device=x.device), torch.empty(b, device=x.device)
        programs.halve[(b,)](x, scale.reshape(1), half, norms, errors, d, **row_options(d))
        eps = (errors + 2.0**-12 * (norms + errors) + d * 2.0**-22 * norms) * 1.001
        # A row of W_enc that float16 does not hold has no score: nothing is certain then.
        eps = torch.where(bound.isfinite(), eps, float("inf"))
        return cls(x, b_enc, copy, half, eps, b_enc * scale)

    def rows(self, which: slice | Tensor) -> "Query":
        """Some of the rows."""
        x, half, eps = self.x[which], self.half[which], self.eps[which]
        return replace(self, x=x, half=half, eps=eps)

    def slack(self, rounding: float) -> Float[Tensor, "1"]:
        """How far a bias may be off that is rounded by so much of itself."""
        return (rounding * self.bias.abs().max() + 1e-6).reshape(1)


class AfterProduct:
    """The best latents of a batch; see the module's text.

    Args:
        query: the batch.
        buffer: how many approximate scores are held at once.
    """

    def __init__(self, query: Query, buffer: int = BUFFER) -> None:
        n, b = len(query.copy.half), len(query.x)
        self._query, self._size = query, max(1, min(b, buffer // n // 128 * 128 or buffer // n))
        # The bias is rounded to float16, too.
        self._bias, self._slack = query.bias.half(), query.slack(2.0**-11)

    def fill(self, *wanted: tuple[Codes, Tensor | None]) -> None:
        """Write the exact best latents of all rows into codes; of those in a mask (n) where there is one."""
        for start in range(0, len(self._query.x), self._size):
            part = slice(start, start + self._size)
            query = self._query.rows(part)
            scores = torch.addmm(self._bias, query.half, query.copy.half.T)
            for best, among in wanted:
                self._keep(Codes(best.values[part], best.indices[part]), query, scores, among)
            del scores  # before the next ones are made beside them

    def _keep(self, best: Codes, query: Query, scores: Tensor, among: Tensor | None) -> None:
        (count, n), k = scores.shape, best.values.shape[1]
        if k == 0:
            return
        if k > MOST:
            _by_whole_products(best, query, among)
            return
        wide = triton.next_power_of_2(max(WIDE, 2 * k))
        floors = torch.empty(count, device=scores.device)
        candidates = torch.empty(count, wide, dtype=torch.int32, device=scores.device)
        found = torch.zeros(count, dtype=torch.int32, device=scores.device)
        mask = among if among is not None else found
        programs.select[(count,)](
            *(scores, query.eps, self._slack, query.copy.bounds),
            *(mask, candidates, found, floors, n, k),
            MASKED=among is not None,
            GROUPS=triton.next_power_of_2(max(GROUPS, 8 * k)),
            WIDE=wide,
            num_warps=8,
            **FUSED,
        )
        rescued(query, candidates, found, k, Scored(scores, floors, among))
        rescored(best, query, candidates, found)


def _by_whole_products(best: Codes, query: Query, among: Tensor | None) -> None:
    scores = torch.addmm(query.b_enc, query.x, query.copy.source.T)
    if among is not None:
        scores.masked_fill_(among == 0, float("-inf"))
    found = scores.topk(best.values.shape[1], dim=1)
    best.values.copy_(found.values)
    best.indices.copy_(found.indices)


def rescored(best: Codes, query: Query, candidates: Tensor, found: Tensor) -> None:
    """Score candidates (b, room) in float32 and keep the best."""
    (count, wide), d, k = candidates.shape, query.x.shape[1], best.values.shape[1]
    exact = torch.empty(count, wide, device=query.x.device)
    programs.rescore[(count,)](
        *(query.x, query.copy.source, query.b_enc, candidates, found, exact, d),
        WIDE=wide,
        **tile_options(d, wide),
    )
    programs.pick[(count,)](
        *(exact, candidates, found, best.values, best.indices, k), WIDE=wide, num_warps=4, **FUSED
    )


class Scored(NamedTuple):
    """What is known of rows' scores: approximate ones, bounds of the k-th best, a mask (n) of what counts."""

    scores: Float16[Tensor, "b n"]
    floors: Float[Tensor, " b"]
    among: Tensor | None


def rescued(query: Query, candidates: Tensor, found: Tensor, k: int, known: Scored | None) -> None:
    """Find candidates (b, room) of rows with more of them anew; without known scores among all latents."""
    (count, room), n, d = candidates.shape, len(query.b_enc), query.x.shape[1]
    scores, floors, among = known or Scored(query.half, query.eps, None)
    kept = min(room, triton.next_power_of_2(max(k + BESIDE, RESCUED)))
    programs.rescue[(count,)](
        *(query.x, query.copy.source, query.b_enc, scores, query.eps, query.copy.bounds, floors),
        *(found if among is None else among, candidates, found, n, d),
        SCORED=known is not None,
        MASKED=among is not None,
        WIDE=room,
        KEPT=kept,
        BLOCK=min(64, RESCUED_TILE // kept),
        num_warps=4 if kept <= 64 else 8,
        **FUSED,
    )


def empty_codes(x: Float[Tensor, "b d"], k: int) -> Codes:
    """Codes that are still to be written."""
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    return Codes(torch.empty(len(x), k, device=x.device), indices)


def row_options(d: int) -> dict[str, Any]:
    """How a program holds one row of width d."""
    block = triton.next_power_of_2(d)
    return {"D": block, "num_warps": 8 if block >= 2048 else 4 if block >= 512 else 1} | FUSED


def tile_options(d: int, k: int) -> dict[str, Any]:
    """How a program holds some rows of width d at once."""
    return {"ROWS": min(4, triton.next_power_of_2(k))} | row_options(d)
