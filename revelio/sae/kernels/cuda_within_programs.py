"""The Triton programs of :mod:`revelio.sae.kernels.cuda_within`, which says what they compute and why.

``c`` images at a time; ``WIDE`` is how many candidates an image has room for.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def guess(sample, eps, floors, n, rank, GROUPS: tl.constexpr):
    """The rank-th best score of an image's sample of latents, or a little less: that of groups' maxima."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, GROUPS)
    best = tl.full([GROUPS], float("-inf"), tl.float32)
    for start in range(0, n, GROUPS):
        j = start + i
        best = tl.maximum(
            best, tl.load(sample + row * n + j, mask=j < n, other=float("-inf")).to(tl.float32)
        )
    ordered = tl.sort(best, descending=True)
    floor = tl.sum(tl.where(i == rank - 1, ordered, 0.0), 0)
    # Without a bound no latent is to be written down: the image is searched otherwise.
    e = tl.load(eps + row)
    tl.store(floors + row, tl.where(e < float("inf"), floor, float("nan")))


@triton.jit
def error_of(score, eps, bound, slack):
    """How far a float32 score may be off, its bias's addition included."""
    return eps * bound + tl.abs(score) * 1e-6 + slack


@triton.jit
def nominate(
    x, weight, bias, eps, slack, bounds, floors, latents, scores, found, c, n, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr,
    WHOLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the product of float16 rows, of which what may reach its image's floor is written down.

    Tiles that run at the same time share rows: ``BAND`` tiles of images take turns.
    """
    down, across = tl.cdiv(c, ROWS), tl.cdiv(n, COLUMNS)
    place = tl.program_id(0)
    first = place // (BAND * across) * BAND
    height = tl.minimum(down - first, BAND)
    within = place % (BAND * across)
    rows = (first + within % height) * ROWS + tl.arange(0, ROWS)
    first_column, offsets = within // height * COLUMNS, tl.arange(0, COLUMNS)
    columns = first_column + offsets
    deep = tl.arange(0, DEPTH)
    # Images and latents beyond the last are read as the last, and not written down.
    own = x + tl.minimum(rows, c - 1).to(tl.int64)[:, None] * d + deep[None, :]
    theirs = weight + tl.minimum(columns, n - 1).to(tl.int64)[None, :] * d + deep[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, d, DEPTH):
        if WHOLE:  # d is a multiple of DEPTH
            total = tl.dot(tl.load(own + start), tl.load(theirs + start), total)
        else:
            inside = start + deep < d
            a = tl.load(own + start, mask=inside[None, :], other=0.0)
            b = tl.load(theirs + start, mask=inside[:, None], other=0.0)
            total = tl.dot(a, b, total)
    total += tl.load(bias + columns, mask=columns < n, other=0.0)[None, :]
    bound = tl.load(bounds + columns, mask=columns < n, other=0.0).to(tl.float32)
    e = tl.load(eps + rows, mask=rows < c, other=0.0)
    floor = tl.load(floors + rows, mask=rows < c, other=float("inf"))
    reach = total + error_of(total, e[:, None], bound[None, :], tl.load(slack))
    wanted = (reach >= floor[:, None]) & (rows < c)[:, None] & (columns < n)[None, :]
    # One of every image at a time, of which a tile has few: to write down all at once takes more registers
    # than there are. In any order: `pick` sorts them.
    left = tl.where(wanted, total, float("-inf"))
    most = tl.max(left, 1)
    while tl.max(most, 0) > float("-inf"):
        which, some = tl.argmax(left, 1), most > float("-inf")
        at = tl.atomic_add(found + rows, 1, mask=some, sem="relaxed")
        kept = some & (at < WIDE)
        tl.store(latents + rows * WIDE + at, first_column + which, mask=kept)
        tl.store(scores + rows * WIDE + at, most, mask=kept)
        left = tl.where(offsets[None, :] == which[:, None], float("-inf"), left)
        most = tl.max(left, 1)


@triton.jit
def narrow(
    latents, scores, found, eps, slack, bounds, floors, candidates, counts, missed, slots, k,
    WIDE: tl.constexpr, ROOM: tl.constexpr, SPARE: tl.constexpr,
):  # fmt: skip
    """Of what was written down for an image, what may be among its k best; or that it must be searched anew.

    The k-th best of ``score - error`` is a bound of the k-th best score. Where it is not below the guess, no
    latent that was passed over reaches it.
    """
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    count, floor = tl.load(found + row), tl.load(floors + row)
    here = i < count
    latent = tl.load(latents + row * WIDE + i, mask=here, other=0)
    score = tl.load(scores + row * WIDE + i, mask=here, other=float("-inf"))
    bound = tl.load(bounds + latent, mask=here, other=0.0).to(tl.float32)
    off = tl.where(here, error_of(score, tl.load(eps + row), bound, tl.load(slack)), 0.0)
    ordered = tl.sort(tl.where(here, score - off, float("-inf")), descending=True)
    bar = tl.sum(tl.where(i == k - 1, ordered, 0.0), 0)
    wanted = here & (score + off >= bar)
    kept = tl.sum(wanted.to(tl.int32), 0)
    certain = (count >= k) & (count <= WIDE) & (bar >= floor) & (kept <= ROOM)
    at = tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(candidates + row * ROOM + at, latent, mask=wanted & (at < ROOM))
    tl.store(counts + row, tl.where(certain, kept, 0))
    if certain == 0:
        slot = tl.atomic_add(missed, 1, sem="relaxed")
        if slot < SPARE:
            tl.store(slots + slot, row.to(tl.int32))
        else:
            tl.store(counts + row, ROOM + 1)


@triton.jit
def put(values, indices, slots, found_values, found_indices, k, K: tl.constexpr):
    """The codes of an image that was searched anew, to their place."""
    slot, i = tl.program_id(0).to(tl.int64), tl.arange(0, K)
    row = tl.load(slots + slot).to(tl.int64)
    if row >= 0:
        value = tl.load(found_values + slot * k + i, mask=i < k, other=0.0)
        latent = tl.load(found_indices + slot * k + i, mask=i < k, other=0)
        tl.store(values + row * k + i, value, mask=i < k)
        tl.store(indices + row * k + i, latent, mask=i < k)
