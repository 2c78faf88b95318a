"""The Triton programs of :mod:`revelio.sae.kernels.cuda`, which says what they compute and why it is exact.

A program holds one image's or one latent's row in registers, padded to a power of two; sums over a row are in
one fixed order. ``d`` is the row's width, ``D`` the padded one, ``ROWS`` how many rows are read at a time.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def halve(source, scale, half, norms, errors, d, D: tl.constexpr):
    """A row times ``scale`` in float16, its norm, and the norm of what rounding lost."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    x = tl.load(source + row * d + i, mask=i < d, other=0.0) * tl.load(scale)
    rounded = x.to(tl.float16)
    lost = x - rounded.to(tl.float32)
    tl.store(half + row * d + i, rounded, mask=i < d)
    tl.store(norms + row, tl.sqrt(tl.sum(x * x, 0)))
    tl.store(errors + row, tl.sqrt(tl.sum(lost * lost, 0)))


@triton.jit
def bound(norm, error):
    """What an image's error is multiplied by for this latent: its norm, in float16, rounded up."""
    return (tl.maximum(norm, error * 4096.0) * 1.001 + 1e-7).to(tl.float16)


@triton.jit
def bounds_of(source, half, bounds, d, D: tl.constexpr):
    """The float16 copy of one latent's row, and its bound."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    w = tl.load(source + row * d + i, mask=i < d, other=0.0)
    rounded = w.to(tl.float16)
    lost = w - rounded.to(tl.float32)
    tl.store(half + row * d + i, rounded, mask=i < d)
    tl.store(bounds + row, bound(tl.sqrt(tl.sum(w * w, 0)), tl.sqrt(tl.sum(lost * lost, 0))))


@triton.jit
def error_of(score, eps, bounds, latents, inside):
    """How far a score may be off; rounding one to float16 moves it by 2^-11 of itself."""
    bound = tl.load(bounds + latents, mask=inside, other=0.0).to(tl.float32)
    return eps * bound + tl.abs(score) * 0.0005


@triton.jit
def select(
    scores, eps, slack, bounds, mask, candidates, found, floors, n, k,
    MASKED: tl.constexpr, GROUPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The latents of an image that may be among its k best; more than fit are only counted."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, GROUPS)
    low = float("-inf")
    best = tl.full([GROUPS], low, tl.float32)
    e = tl.load(eps + row)
    for start in range(0, n, GROUPS):
        j = start + i
        part = tl.load(scores + row * n + j, mask=j < n, other=low).to(tl.float32)
        if MASKED:
            part = tl.where(tl.load(mask + j, mask=j < n, other=0) != 0, part, low)
        off = error_of(part, e, bounds, j, j < n)
        best = tl.maximum(best, tl.where(part > low, part - off, low))
    ordered = tl.sort(best, descending=True)
    floor = tl.sum(tl.where(i == k - 1, ordered, 0.0), 0) - 2 * tl.load(slack)
    tl.store(floors + row, floor)
    for start in range(0, n, GROUPS):
        j = start + i
        part = tl.load(scores + row * n + j, mask=j < n, other=low).to(tl.float32)
        if MASKED:
            part = tl.where(tl.load(mask + j, mask=j < n, other=0) != 0, part, low)
        off = error_of(part, e, bounds, j, j < n)
        wanted = (part > low) & (part + off >= floor)
        # Candidates may stand in any order: `pick` sorts them.
        place = tl.atomic_add(found + row + i * 0, 1, mask=wanted, sem="relaxed")
        tl.store(candidates + row * WIDE + place, j, mask=wanted & (place < WIDE))
    tl.debug_barrier()
    # Without a bound nothing is certain: such a row is looked at as a whole.
    tl.store(found + row, WIDE + 1, mask=(e != e) | (e == float("inf")))


@triton.jit
def rescore(
    x, weight, bias, candidates, found, exact, d,
    WIDE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Their scores in float32."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    count = tl.load(found + row)
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
def pick(exact, candidates, found, values, indices, k, WIDE: tl.constexpr):
    """The k best of them, ties to the lower latent."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    count = tl.load(found + row)
    latent = tl.load(candidates + row * WIDE + c, mask=c < count, other=0)
    score = tl.load(exact + row * WIDE + c, mask=c < count, other=float("-inf"))
    ordered = tl.sort(_key(score, latent), descending=True)
    best, chosen = _unkey(ordered)
    tl.store(values + row * k + c, best, mask=c < k)
    tl.store(indices + row * k + c, chosen, mask=c < k)


@triton.jit
def rescue(
    x, weight, bias, scores, eps, bounds, floors, mask, candidates, found, n, d,
    SCORED: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a row with more candidates than fit the best in float32, some at a time. Slow, and seldom needed.

    Without scores every latent is a candidate. `rescore` adds in another order, so a few more are kept than
    are wanted: results have its bits, and do not tell which rows were rescued.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(found + row) > WIDE:
        i, half = tl.arange(0, KEPT), tl.arange(0, 2)
        low = float("-inf")
        best, count = _key(tl.full([KEPT], low, tl.float32), i * 0), 0
        e, floor = tl.load(eps + row), tl.load(floors + row)
        for start in range(0, n, KEPT):
            j = start + i
            wanted = j < n
            if SCORED:
                part = tl.load(scores + row * n + j, mask=j < n, other=0.0).to(tl.float32)
                off = error_of(part, e, bounds, j, j < n)
                # Without a bound nothing is below the floor.
                wanted = wanted & ((part + off < floor) == 0)
            if MASKED:
                wanted = wanted & (tl.load(mask + j, mask=j < n, other=0) != 0)
            if tl.sum(wanted.to(tl.int32), 0) > 0:
                score = tl.load(bias + j, mask=wanted, other=0.0)
                for first in range(0, d, BLOCK):
                    c = first + tl.arange(0, BLOCK)
                    own = tl.load(x + row * d + c, mask=c < d, other=0.0)
                    inside = wanted[:, None] & (c < d)[None, :]
                    place = weight + j.to(tl.int64)[:, None] * d + c[None, :]
                    score += tl.sum(tl.load(place, mask=inside, other=0.0) * own[None, :], 1)
                # NaN is not lost among the lowest: rescored, it is NaN again.
                score = tl.where(score == score, score, float("inf"))
                score = tl.where(wanted, score, low)
                count += tl.sum((score > low).to(tl.int32), 0)
                both = tl.reshape(tl.join(best, _key(score, j)), [2 * KEPT])
                both = tl.sort(both, descending=True)
                best = tl.sum(tl.where((half == 0)[:, None], tl.reshape(both, [2, KEPT]), 0), 0)
        _, chosen = _unkey(best)
        count = tl.minimum(count, KEPT)
        tl.store(candidates + row * WIDE + i, chosen.to(tl.int32), mask=i < count)
        tl.store(found + row, count)


@triton.jit
def decode(values, indices, rows, out, d, k, ROWS: tl.constexpr, D: tl.constexpr):
    """An image's code times ``rows``."""
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
def products(outputs, indices, rows, out, d, k, ROWS: tl.constexpr, D: tl.constexpr):
    """The dot products of an image's output with the rows of its code."""
    image, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    own = tl.load(outputs + image * d + i, mask=i < d, other=0.0)
    for start in range(0, k, ROWS):
        c = start + tl.arange(0, ROWS)
        latent = tl.load(indices + image * k + c, mask=c < k, other=0)
        inside = (c < k)[:, None] & (i < d)[None, :]
        part = tl.load(rows + latent[:, None] * d + i[None, :], mask=inside, other=0.0)
        tl.store(out + image * k + c, tl.sum(part * own[None, :], 1), mask=c < k)


@triton.jit
def unit_norm(matrix, last, d, D: tl.constexpr):
    """A moving row at unit length."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    if tl.load(last + row) > 0:
        w = tl.load(matrix + row * d + i, mask=i < d, other=0.0)
        tl.store(matrix + row * d + i, w / tl.sqrt(tl.sum(w * w, 0)), mask=i < d)


@triton.jit
def _adam(w, g, mean, square, rate, root, beta1, beta2, eps):
    mean = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g * g
    return w - rate * mean / (tl.sqrt(square) / root + eps), mean, square


@triton.jit
def vector(vector, gradients, means, squares, go, clock, n, beta1, beta2, eps, BLOCK: tl.constexpr):
    """Adam on a bias."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.where(tl.load(go) != 0, n, 0)
    w, g = (
        tl.load(vector + i, mask=inside, other=0.0),
        tl.load(gradients + i, mask=inside, other=0.0),
    )
    mean = tl.load(means + i, mask=inside, other=0.0)
    square = tl.load(squares + i, mask=inside, other=0.0)
    rate, root = tl.load(clock + 1).to(tl.float32), tl.load(clock + 2).to(tl.float32)
    w, mean, square = _adam(w, g, mean, square, rate, root, beta1, beta2, eps)
    tl.store(vector + i, w, mask=inside)
    tl.store(means + i, mean, mask=inside)
    tl.store(squares + i, square, mask=inside)


@triton.jit
def add_terms(
    first, end, images, output_rows, gradients, values, inputs, outputs, d, D: tl.constexpr,
):  # fmt: skip
    """A latent's gradients from some of its terms, added one after another; how many are not zero."""
    i = tl.arange(0, D)
    g_enc, g_dec, g_bias, count = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32), 0.0, 0
    for term in range(first, end):
        gradient, value = tl.load(gradients + term), tl.load(values + term)
        x = tl.load(inputs + tl.load(images + term) * d + i, mask=i < d, other=0.0)
        out = tl.load(outputs + tl.load(output_rows + term) * d + i, mask=i < d, other=0.0)
        g_enc += gradient * x
        g_dec += value * out
        g_bias += gradient
        # Kept values that a ReLU has set to zero wake no row.
        count += ((gradient != 0.0) | (value != 0.0)).to(tl.int32)
    return g_enc, g_dec, g_bias, count


@triton.jit
def sum_blocks(
    latents, images, output_rows, gradients, values, inputs, outputs,
    enc_sums, dec_sums, bias_sums, counts, d,
    TERMS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A block of terms that are all of one latent: their sum, so that no program adds thousands."""
    block, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    first, end = block * TERMS, (block + 1) * TERMS
    if tl.load(latents + first) == tl.load(latents + end - 1):
        g_enc, g_dec, g_bias, count = add_terms(
            first, end, images, output_rows, gradients, values, inputs, outputs, d, D
        )
        tl.store(enc_sums + block * d + i, g_enc, mask=i < d)
        tl.store(dec_sums + block * d + i, g_dec, mask=i < d)
        tl.store(bias_sums + block, g_bias)
        tl.store(counts + block, count)


@triton.jit
def gradient_of(
    first, end, images, output_rows, gradients, values, inputs, outputs,
    enc_sums, dec_sums, bias_sums, counts, d,
    TERMS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """All terms of a latent: up to the first whole block, the blocks' sums, then what is left."""
    i = tl.arange(0, D)
    whole, cut = tl.cdiv(first, TERMS), end // TERMS
    head = tl.minimum(end, whole * TERMS)
    g_enc, g_dec, g_bias, terms = add_terms(
        first, head, images, output_rows, gradients, values, inputs, outputs, d, D
    )
    for block in range(whole, cut):
        place = tl.full([], block, tl.int64) * d + i
        g_enc += tl.load(enc_sums + place, mask=i < d, other=0.0)
        g_dec += tl.load(dec_sums + place, mask=i < d, other=0.0)
        g_bias += tl.load(bias_sums + block)
        terms += tl.load(counts + block)
    tail_enc, tail_dec, tail_bias, tail = add_terms(
        tl.maximum(head, cut * TERMS), end,
        images, output_rows, gradients, values, inputs, outputs, d, D,
    )  # fmt: skip
    return g_enc + tail_enc, g_dec + tail_dec, g_bias + tail_bias, terms + tail


@triton.jit
def update(
    W_enc, W_dec, enc_mean, enc_square, dec_mean, dec_square, last,
    half, bounds, starts, images, output_rows, gradients, values, inputs, outputs, d_b_enc,
    enc_sums, dec_sums, bias_sums, counts,
    go, clock, beta1, beta2, eps, d,
    UNIT: tl.constexpr, TERMS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One latent's rows: gradient, projection, Adam, unit length, float16 copy."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    first, end, state = tl.load(starts + row), tl.load(starts + row + 1), tl.load(last + row)
    if (tl.load(go) != 0) & ((end > first) | (state > 0)):
        t = tl.load(clock).to(tl.int64)
        rate, root = tl.load(clock + 1).to(tl.float32), tl.load(clock + 2).to(tl.float32)
        looking = tl.load(clock + 3) != 0
        here = row * d + i
        g_enc, g_dec, g_bias, terms = gradient_of(
            first, end, images, output_rows, gradients, values, inputs, outputs,
            enc_sums, dec_sums, bias_sums, counts, d, TERMS, D,
        )  # fmt: skip
        active = terms > 0
        # Triton 3.9's interpreter takes no mask that a truth value of the whole row was joined to.
        inside = i < tl.where(active | (state > 0), d, 0)
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
        now = tl.where(active, t, state)
        still_dec = (active == 0) & (tl.sum((new_dec != dec).to(tl.int32), 0) == 0)
        if looking:
            same = tl.sum((new_enc != enc).to(tl.int32), 0) == 0
            now = tl.where(still_dec & same & (state > 0), -t, now)
        if UNIT:
            length = tl.sqrt(tl.sum(new_dec * new_dec, 0))
            new_dec = tl.where(still_dec, new_dec, new_dec / length)
        tl.store(W_enc + here, new_enc, mask=inside)
        tl.store(W_dec + here, new_dec, mask=inside)
        tl.store(enc_mean + here, m_enc, mask=inside)
        tl.store(enc_square + here, s_enc, mask=inside)
        tl.store(dec_mean + here, m_dec, mask=inside)
        tl.store(dec_square + here, s_dec, mask=inside)
        rounded = new_enc.to(tl.float16)
        lost = new_enc - rounded.to(tl.float32)
        tl.store(half + here, rounded, mask=inside)
        if active | (state > 0):
            tl.store(last + row, now)
            norm, error = tl.sqrt(tl.sum(new_enc * new_enc, 0)), tl.sqrt(tl.sum(lost * lost, 0))
            tl.store(bounds + row, bound(norm, error))
            tl.store(d_b_enc + row, g_bias)
