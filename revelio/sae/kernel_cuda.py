"""The CUDA kernel: the interface of :mod:`revelio.sae.kernel` in Triton, without a host synchronisation.

Encoding is a search in three parts, exact in float32:

1. Nomination. One float16 tensor-core product of the (scaled) activations and a float16 copy of ``W_enc``
   gives approximate scores ``a``, a chunk of images at a time.
2. Selection. With ``eps`` a bound of an image's approximation error, every latent of its exact top k has
   ``a >= a_(k) - 2 eps``: k latents have an exact score of at least ``a_(k) - eps``, so none below that is
   among the k best. The k-th largest of disjoint groups' maxima is a lower bound of ``a_(k)``.
3. Rescoring. The candidates, a few more than k, are scored in float32; the k best are kept, ties going to the
   lower index. An image with more candidates than fit is scored in float32 against all latents.

The bound is Cauchy-Schwarz on the two rounding errors, plus what accumulating in float32 can lose:

    |x w - x~ w~| <= |x - x~| |w| + |x~| |w - w~| + d 2^-22 |x| |w|

with ``|w - w~|`` kept up to date for every row that an update changes. The update is one program a latent: the
sums of its gradient's terms in the order of the images, projection, Adam, unit length, and the row's float16
copy. It leaves rows alone that cannot change (:mod:`revelio.sae.adam`). Nothing is added atomically, so the
same inputs give the same bits.
"""

from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Bool, Float, Float16
from torch import Tensor

from revelio.sae.adam import FIRST_REST, REST_EVERY, AdamRows, AdamStep, update_vector
from revelio.sae.kernel import Codes, Gradient, Weights

# Approximate scores held at once: 96 MiB in float16.
BUFFER = 48 << 20
# Scores stay below this after scaling, half of what float16 holds at most.
LARGEST = 2.0**14
# The most latents an image that are chosen by candidates; more (AuxK) take whole products.
MOST = 256


class _Copy(NamedTuple):
    """The float16 copy of ``W_enc``; ``source`` is held so that its address stays its own."""

    source: Tensor
    half: Float16[Tensor, "n d"]
    norms: Float[Tensor, " n"]
    errors: Float[Tensor, " n"]


class CudaKernel:
    """See :class:`revelio.sae.kernel.Kernel`; weights, inputs and moments are float32 on one CUDA device.

    A kernel keeps a float16 copy of one model's ``W_enc`` and renews it with every update it makes. Whoever
    changes ``W_enc`` by other means makes a new kernel.

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
        """See :class:`~revelio.sae.kernel.Kernel`; larger first, ties to the lower index."""
        search = _Search(self._copied(weights.W_enc), centred.contiguous(), weights.b_enc, self.buffer)
        best, mask = _empty(centred, min(k, len(weights.W_enc))), None
        others = None
        if among is not None:
            mask = among.to(torch.uint8)
            others = _empty(centred, min(k_among, len(weights.W_enc)))
        for rows in search.chunks():
            scores = search.scores(rows)
            search.keep(best, scores, rows, None)
            if others is not None:
                search.keep(others, scores, rows, mask)
        return best, others

    @torch.no_grad()
    def decode(self, codes: Codes, rows: Float[Tensor, "n d"]) -> Float[Tensor, "b d"]:
        """See :class:`~revelio.sae.kernel.Kernel`."""
        (b, k), d = codes.values.shape, rows.shape[1]
        out = torch.empty(b, d, device=rows.device)
        values, indices = codes.values.contiguous(), codes.indices.contiguous()
        if b:
            _decode[(b,)](values, indices, rows, out, d, k, **_tile(d, k))
        return out

    @torch.no_grad()
    def code_gradients(
        self, codes: Codes, outputs: Float[Tensor, "b d"], rows: Float[Tensor, "n d"]
    ) -> Float[Tensor, "b k"]:
        """See :class:`~revelio.sae.kernel.Kernel`."""
        (b, k), d = codes.values.shape, rows.shape[1]
        out = torch.empty(b, k, device=rows.device)
        if b:
            indices = codes.indices.contiguous()
            _products[(b,)](outputs.contiguous(), indices, rows, out, d, k, **_tile(d, k))
        return out

    @torch.no_grad()
    def unit_norm(self, weights: Weights, moments: AdamRows) -> None:
        """See :class:`~revelio.sae.kernel.Kernel`."""
        n, d = weights.W_dec.shape
        _unit_norm[(n,)](weights.W_dec, moments.last, d, **_row(d))

    @torch.no_grad()
    def update(
        self, weights: Weights, moments: AdamRows, gradient: Gradient, step: AdamStep
    ) -> None:
        """See :class:`~revelio.sae.kernel.Kernel`."""
        n, d = weights.W_enc.shape
        copy = self._copied(weights.W_enc)
        latents, order = gradient.latents.to(torch.int32).sort(stable=True)
        edges = torch.arange(n + 1, device=latents.device, dtype=torch.int32)
        starts = torch.searchsorted(latents, edges, out_int32=True)
        d_b_enc = torch.zeros_like(weights.b_enc)
        looking = step.t >= FIRST_REST and step.t % REST_EVERY == 0
        _update[(n,)](
            *(weights.W_enc, weights.W_dec, moments.W_enc.mean, moments.W_enc.square),
            *(moments.W_dec.mean, moments.W_dec.square, moments.last),
            *(copy.half, copy.norms, copy.errors, starts),
            *(gradient.images[order], gradient.output_rows[order]),
            *(gradient.gradients[order], gradient.values[order]),
            *(gradient.inputs.contiguous(), gradient.outputs.contiguous(), d_b_enc),
            *(step.t, step.learning_rate / (1 - step.beta1**step.t)),
            *((1 - step.beta2**step.t) ** 0.5, step.beta1, step.beta2, step.eps, d),
            LOOKING=looking,
            UNIT=step.unit_norm,
            **_row(d),
        )
        update_vector(weights.b_enc, d_b_enc, moments.b_enc, step)
        update_vector(weights.b_dec, gradient.b_dec, moments.b_dec, step)

    def _copied(self, W_enc: Float[Tensor, "n d"]) -> _Copy:
        """The copy of these weights, made at their first use."""
        held = self._copy
        if held is not None and held.source.data_ptr() == W_enc.data_ptr():
            return held
        self._copy = None
        n, d = W_enc.shape
        half = torch.empty(n, d, dtype=torch.float16, device=W_enc.device)
        norms, errors = torch.empty(n, device=W_enc.device), torch.empty(n, device=W_enc.device)
        _halve[(n,)](W_enc, W_enc.new_ones(1), half, norms, errors, d, **_row(d))
        self._copy = _Copy(W_enc, half, norms, errors)
        return self._copy


class _Search:
    """The best latents of a batch; see the module's text."""

    def __init__(self, copy: _Copy, x: Float[Tensor, "b d"], b_enc: Tensor, buffer: int) -> None:
        (b, d), n = x.shape, len(copy.half)
        self.x, self.copy, self.b_enc, self.n = x, copy, b_enc, n
        self.size = max(1, min(b, buffer // n // 128 * 128 or buffer // n))
        tiny = torch.finfo(torch.float32).tiny
        w_norm, w_error = copy.norms.max(), copy.errors.max()
        bias = b_enc.abs().max()
        x_norms = torch.linalg.vector_norm(x, dim=1)
        largest = x_norms.max() * w_norm.clamp(min=1) + bias
        # A power of two, so that scaling rounds nothing.
        scale = torch.exp2(torch.floor(torch.log2(LARGEST / largest.clamp(min=tiny))).clamp(-60, 60))
        self.scale = scale.reshape(1)
        self.half = torch.empty(b, d, dtype=torch.float16, device=x.device)
        norms, errors = torch.empty(b, device=x.device), torch.empty(b, device=x.device)
        if b:
            _halve[(b,)](x, self.scale, self.half, norms, errors, d, **_row(d))
        # float16 of the bias, 2^-11 of it; accumulation, twice (there and in rescoring).
        lost = d * 2.0**-22 * norms * w_norm + 2.0**-11 * bias * scale
        self.eps = (errors * w_norm + (norms + errors) * w_error + lost) * 1.001
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
        wide = triton.next_power_of_2(max(128, 2 * k))
        candidates = torch.empty(count, wide, dtype=torch.int32, device=x.device)
        found = torch.empty(count, dtype=torch.int32, device=x.device)
        mask = among if among is not None else found
        groups = triton.next_power_of_2(max(1024, 8 * k))
        _select[(count,)](
            *(scores, self.eps[rows], mask, candidates, found, self.n, k),
            MASKED=among is not None,
            GROUPS=groups,
            WIDE=wide,
            num_warps=8,
        )
        exact = torch.empty(count, wide, device=x.device)
        d, weight = x.shape[1], self.copy.source
        _rescore[(count,)](
            *(x, weight, self.b_enc, candidates, found, exact, d), WIDE=wide, **_tile(d, wide)
        )
        values, indices = best.values[rows], best.indices[rows]
        _pick[(count,)](exact, candidates, found, values, indices, k, WIDE=wide, num_warps=4)
        _rescue[(count,)](
            *(x, weight, self.b_enc, mask, found, values, indices, self.n, d, k),
            MASKED=among is not None,
            WIDE=wide,
            KEPT=triton.next_power_of_2(k),
            BLOCK=64,
            num_warps=4,
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


def _row(d: int) -> dict[str, Any]:
    """How a program holds one row of width d."""
    block = triton.next_power_of_2(d)
    return {"D": block, "num_warps": 8 if block >= 2048 else 4 if block >= 512 else 1}


def _tile(d: int, k: int) -> dict[str, Any]:
    """How a program holds some rows of width d at once."""
    return {"ROWS": min(4, triton.next_power_of_2(k))} | _row(d)


@triton.jit
def _halve(source, scale, half, norms, errors, d, D: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    x = tl.load(source + row * d + i, mask=i < d, other=0.0) * tl.load(scale)
    rounded = x.to(tl.float16)
    lost = x - rounded.to(tl.float32)
    tl.store(half + row * d + i, rounded, mask=i < d)
    tl.store(norms + row, tl.sqrt(tl.sum(x * x, 0)))
    tl.store(errors + row, tl.sqrt(tl.sum(lost * lost, 0)))


@triton.jit
def _select(
    scores, eps, mask, candidates, found, n, k,
    MASKED: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, GROUPS)
    low = float("-inf")
    best = tl.full([GROUPS], low, tl.float32)
    for start in range(0, n, GROUPS):
        j = start + i
        part = tl.load(scores + row * n + j, mask=j < n, other=low).to(tl.float32)
        if MASKED:
            part = tl.where(tl.load(mask + j, mask=j < n, other=0) != 0, part, low)
        best = tl.maximum(best, part)
    ordered = tl.sort(best, descending=True)
    kth = tl.sum(tl.where(i == k - 1, ordered, 0.0), 0)
    # Rounding scores to float16 keeps their order and moves them by 2^-11 of themselves.
    floor = kth - 2 * tl.load(eps + row)
    floor = floor - tl.abs(floor) * 0.001953125 - 1e-6
    held = tl.zeros([], tl.int32)
    for start in range(0, n, GROUPS):
        j = start + i
        part = tl.load(scores + row * n + j, mask=j < n, other=low).to(tl.float32)
        if MASKED:
            part = tl.where(tl.load(mask + j, mask=j < n, other=0) != 0, part, low)
        wanted = (part >= floor) & (part > low)
        number = tl.sum(wanted.to(tl.int32), 0)
        if number > 0:
            place = held + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(candidates + row * WIDE + place, j, mask=wanted & (place < WIDE))
            held += number
    # A score that is not a number would hide a latent: such a row is looked at as a whole.
    tl.store(found + row, tl.where(floor == floor, held, WIDE + 1))


@triton.jit
def _rescore(
    x, weight, bias, candidates, found, exact, d,
    WIDE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    count = tl.load(found + row)
    if count <= WIDE:
        own = tl.load(x + row * d + i, mask=i < d, other=0.0)
        for start in range(0, count, ROWS):
            c = start + tl.arange(0, ROWS)
            latent = tl.load(candidates + row * WIDE + c, mask=c < count, other=0).to(tl.int64)
            inside = (c < count)[:, None] & (i < d)[None, :]
            w = tl.load(weight + latent[:, None] * d + i[None, :], mask=inside, other=0.0)
            score = tl.sum(w * own[None, :], 1) + tl.load(bias + latent, mask=c < count, other=0.0)
            tl.store(exact + row * WIDE + c, score, mask=c < count)


@triton.jit
def _key(score, latent):
    """An integer that sorts by score, then by lower latent."""
    bits = score.to(tl.int32, bitcast=True)
    rising = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (rising << 32) | (0x7FFFFFFF - latent.to(tl.int64))


@triton.jit
def _unkey(key):
    rising = (key >> 32).to(tl.int32)
    bits = tl.where(rising < 0, rising ^ 0x7FFFFFFF, rising)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def _pick(exact, candidates, found, values, indices, k, WIDE: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    count = tl.load(found + row)
    if count <= WIDE:
        latent = tl.load(candidates + row * WIDE + c, mask=c < count, other=0)
        score = tl.load(exact + row * WIDE + c, mask=c < count, other=float("-inf"))
        ordered = tl.sort(_key(score, latent), descending=True)
        best, chosen = _unkey(ordered)
        tl.store(values + row * k + c, best, mask=c < k)
        tl.store(indices + row * k + c, chosen, mask=c < k)


@triton.jit
def _rescue(
    x, weight, bias, mask, found, values, indices, n, d, k,
    MASKED: tl.constexpr, WIDE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows with too many candidates: all latents in float32. Slow, exact, and hardly ever needed."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(found + row) > WIDE:
        i, half = tl.arange(0, KEPT), tl.arange(0, 2)
        best = tl.full([KEPT], -(2**62), tl.int64)
        for start in range(0, n, KEPT):
            j = start + i
            score = tl.load(bias + j, mask=j < n, other=0.0)
            for first in range(0, d, BLOCK):
                c = first + tl.arange(0, BLOCK)
                own = tl.load(x + row * d + c, mask=c < d, other=0.0)
                inside = (j < n)[:, None] & (c < d)[None, :]
                place = weight + j.to(tl.int64)[:, None] * d + c[None, :]
                score += tl.sum(tl.load(place, mask=inside, other=0.0) * own[None, :], 1)
            allowed = j < n
            if MASKED:
                allowed = allowed & (tl.load(mask + j, mask=j < n, other=0) != 0)
            score = tl.where(allowed, score, float("-inf"))
            both = tl.sort(tl.cat(best, _key(score, j), can_reorder=True), descending=True)
            best = tl.sum(tl.where((half == 0)[:, None], tl.reshape(both, [2, KEPT]), 0), 0)
        score, chosen = _unkey(best)
        tl.store(values + row * k + i, score, mask=i < k)
        tl.store(indices + row * k + i, chosen, mask=i < k)


@triton.jit
def _decode(values, indices, rows, out, d, k, ROWS: tl.constexpr, D: tl.constexpr):
    image, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    total = tl.zeros([D], tl.float32)
    for start in range(0, k, ROWS):
        c = start + tl.arange(0, ROWS)
        value = tl.load(values + image * k + c, mask=c < k, other=0.0)
        latent = tl.load(indices + image * k + c, mask=c < k, other=0)
        inside = (c < k)[:, None] & (i < d)[None, :]
        part = tl.load(rows + latent[:, None] * d + i[None, :], mask=inside, other=0.0)
        total += tl.sum(part * value[:, None], 0)
    tl.store(out + image * d + i, total, mask=i < d)


@triton.jit
def _products(outputs, indices, rows, out, d, k, ROWS: tl.constexpr, D: tl.constexpr):
    image, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    own = tl.load(outputs + image * d + i, mask=i < d, other=0.0)
    for start in range(0, k, ROWS):
        c = start + tl.arange(0, ROWS)
        latent = tl.load(indices + image * k + c, mask=c < k, other=0)
        inside = (c < k)[:, None] & (i < d)[None, :]
        part = tl.load(rows + latent[:, None] * d + i[None, :], mask=inside, other=0.0)
        tl.store(out + image * k + c, tl.sum(part * own[None, :], 1), mask=c < k)


@triton.jit
def _unit_norm(matrix, last, d, D: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    if tl.load(last + row) > 0:
        w = tl.load(matrix + row * d + i, mask=i < d, other=0.0)
        tl.store(matrix + row * d + i, w / tl.sqrt(tl.sum(w * w, 0)), mask=i < d)


@triton.jit
def _adam(w, g, mean, square, rate, root, beta1, beta2, eps):
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g * g
    return w - rate * mean / (tl.sqrt(square) / root + eps), mean, square


@triton.jit(do_not_specialize=["t"])
def _update(
    W_enc, W_dec, enc_mean, enc_square, dec_mean, dec_square, last,
    half, norms, errors, starts, images, output_rows, gradients, values, inputs, outputs, d_b_enc,
    t, rate, root, beta1, beta2, eps, d,
    LOOKING: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    first, end, state = tl.load(starts + row), tl.load(starts + row + 1), tl.load(last + row)
    active = end > first
    if active | (state > 0):
        here, inside = row * d + i, i < d
        g_enc, g_dec, g_bias = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32), 0.0
        for term in range(first, end):
            gradient = tl.load(gradients + term)
            x = tl.load(inputs + tl.load(images + term) * d + i, mask=inside, other=0.0)
            out = tl.load(outputs + tl.load(output_rows + term) * d + i, mask=inside, other=0.0)
            g_enc += gradient * x
            g_dec += tl.load(values + term) * out
            g_bias += gradient
        enc = tl.load(W_enc + here, mask=inside, other=0.0)
        dec = tl.load(W_dec + here, mask=inside, other=0.0)
        m_enc = tl.load(enc_mean + here, mask=inside, other=0.0)
        s_enc = tl.load(enc_square + here, mask=inside, other=0.0)
        m_dec = tl.load(dec_mean + here, mask=inside, other=0.0)
        s_dec = tl.load(dec_square + here, mask=inside, other=0.0)
        if state < 0:  # it was at rest: its moments catch up on the decay that they missed
            missed = (t - 1 + state).to(tl.float32)
            slow, fast = tl.exp2(missed * tl.log2(beta1)), tl.exp2(missed * tl.log2(beta2))
            m_enc, m_dec = m_enc * slow, m_dec * slow
            s_enc, s_dec = s_enc * fast, s_dec * fast
        g_dec -= tl.sum(g_dec * dec, 0) * dec
        new_enc, m_enc, s_enc = _adam(enc, g_enc, m_enc, s_enc, rate, root, beta1, beta2, eps)
        new_dec, m_dec, s_dec = _adam(dec, g_dec, m_dec, s_dec, rate, root, beta1, beta2, eps)
        now = tl.where(active, t.to(tl.int64), state)
        still_dec = (active == 0) & (tl.sum((new_dec != dec).to(tl.int32), 0) == 0)
        if LOOKING:
            same = tl.sum((new_enc != enc).to(tl.int32), 0) == 0
            now = tl.where(still_dec & same, -t.to(tl.int64), now)
        if UNIT:
            length = tl.sqrt(tl.sum(new_dec * new_dec, 0))
            new_dec = tl.where(still_dec, new_dec, new_dec / length)
        tl.store(W_enc + here, new_enc, mask=inside)
        tl.store(W_dec + here, new_dec, mask=inside)
        tl.store(enc_mean + here, m_enc, mask=inside)
        tl.store(enc_square + here, s_enc, mask=inside)
        tl.store(dec_mean + here, m_dec, mask=inside)
        tl.store(dec_square + here, s_dec, mask=inside)
        tl.store(last + row, now)
        rounded = new_enc.to(tl.float16)
        lost = new_enc - rounded.to(tl.float32)
        tl.store(half + here, rounded, mask=inside)
        tl.store(norms + row, tl.sqrt(tl.sum(new_enc * new_enc, 0)))
        tl.store(errors + row, tl.sqrt(tl.sum(lost * lost, 0)))
        tl.store(d_b_enc + row, g_bias)
