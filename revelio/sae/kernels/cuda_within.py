# pyright: reportIndexIssue=false
"""The exact best latents of a batch on CUDA, selected within the product that nominates them.

:mod:`revelio.sae.kernels.cuda_search` writes all approximate scores to memory and reads them twice. Here a
tile of the product keeps its scores in registers and writes down only what may be among the best:

1. A guess of each image's k-th best score, from a sample of the latents (every :data:`EVERY`-th) of which so
   many are better that hardly ever more than k of all are above it and fewer than k are not.
2. The product. Latents whose score plus its error reaches the guess are written down with their scores, which
   are float32 still, so that their bounds are tighter.
3. The k-th best of score minus error of those bounds the k-th best score. If it is not below the guess, no
   latent that was passed over can be among the best: the others are rescored as after any nomination.
4. Images of which that does not hold, or of which more were written down than fit, are searched after a
   product of their own, a fixed number of them; if there are more, by all of their latents in float32.

Both searches give the same bits, so which is taken is a matter of time alone: :class:`Nomination` searches a
batch both ways and keeps to the faster one.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]

from revelio.sae.kernels import cuda_within_programs as programs
from revelio.sae.kernels.base import Codes
from revelio.sae.kernels.cuda_search import (
    BUFFER,
    FUSED,
    MOST,
    AfterProduct,
    Query,
    empty_codes,
    rescored,
    rescued,
)

# Of so many latents one is in the sample: the product with it costs as much of the whole one.
EVERY = 16
# Latents that an image has room for before and after narrowing down.
WIDE, ROOM = 1024, 512
# Disjoint groups of the sample, at least, of whose maxima the guess is one.
GROUPS = 1024
# Images whose latents are written down at once.
IMAGES = 2048
# One of so many images has room in the product of those that are searched anew.
SPARE = 16
# Fewer latents are not worth a second way.
FEWEST = 1 << 14
# At which batches of a shape both ways are tried, and how often each is taken for its time.
TRIED, ROUNDS = (3, 1000), 3

How = Literal["auto", "after", "within"]


class Tile(NamedTuple):
    """A program's part of the product, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# The wide one where a card has the registers for it, as an H100 does; which is faster is measured there.
TILES = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3))


def rank(k: int) -> int:
    """Which of the sample's best is the guess: more of the k best are in it once in some 20,000 images."""
    expected = k / EVERY
    return ceil(expected + 4 * sqrt(expected) + 2)


@dataclass(frozen=True)
class WithinProduct:
    """The best latents of a batch; see the module's text."""

    query: Query
    tile: Tile = TILES[0]
    images: int = IMAGES

    def fill(self, best: Codes) -> None:
        """Write the exact best latents of all rows into codes."""
        for start in range(0, len(self.query.x), self.images):
            part = slice(start, start + self.images)
            self._fill(Codes(best.values[part], best.indices[part]), self.query.rows(part))

    def _fill(self, best: Codes, query: Query) -> None:
        (count, d), (n, k) = query.x.shape, (len(query.b_enc), best.values.shape[1])
        device, tile, slack = query.x.device, self.tile, query.slack(2.0**-20)
        wide = triton.next_power_of_2(max(WIDE, 4 * k))
        room = min(wide, triton.next_power_of_2(max(ROOM, 2 * k)))
        floors = self._guess(query, k)
        latents = torch.empty(count, wide, dtype=torch.int32, device=device)
        scores = torch.empty(count, wide, device=device)
        found = torch.zeros(count, dtype=torch.int32, device=device)
        grid = (triton.cdiv(count, tile.rows) * triton.cdiv(n, tile.columns),)
        programs.nominate[grid](
            *(query.half, query.copy.half, query.bias, query.eps, slack, query.copy.bounds, floors),
            *(latents, scores, found, count, n, d),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            BAND=8,
            WHOLE=d % tile.depth == 0,
            WIDE=wide,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **FUSED,
        )
        candidates = torch.empty(count, room, dtype=torch.int32, device=device)
        counts, missed = torch.empty_like(found), found.new_zeros(1)
        slots = found.new_full((max(1, count // SPARE),), -1)
        programs.narrow[(count,)](
            *(latents, scores, found, query.eps, slack, query.copy.bounds, floors),
            *(candidates, counts, missed, slots, k),
            WIDE=wide,
            ROOM=room,
            SPARE=len(slots),
            num_warps=4,
            **FUSED,
        )
        del latents, scores
        rescued(query, candidates, counts, k, None)
        rescored(best, query, candidates, counts)
        # Whether there are any is not asked: nobody waits for the device.
        anew = query.rows(slots.clamp(min=0))
        again = empty_codes(anew.x, k)
        AfterProduct(anew).fill((again, None))
        programs.put[(len(slots),)](
            *(best.values, best.indices, slots, again.values, again.indices, k),
            K=triton.next_power_of_2(k),
            **FUSED,
        )

    def _guess(self, query: Query, k: int) -> torch.Tensor:
        sample = torch.addmm(query.bias[::EVERY].half(), query.half, query.copy.half[::EVERY].T)
        floors = torch.empty(len(sample), device=sample.device)
        best = min(rank(k), sample.shape[1])
        groups = triton.next_power_of_2(max(GROUPS, 8 * best))
        programs.guess[(len(sample),)](
            sample, query.eps, floors, sample.shape[1], best, GROUPS=groups, num_warps=4, **FUSED
        )
        return floors


class Nomination:
    """Which way a batch's best latents are found: the faster one, measured for each shape.

    A shape is tried at its third batch, so that a single one pays no compiling, and once more when a training
    has gone on for a while: a k-SAE that has learned has other scores.

    Args:
        how: always one of the ways, or whichever is faster.
        buffer: how many approximate scores are held at once, after a product.

    Attributes:
        milliseconds: of a batch each way, by its shape (k, n, d, bits of the batch's size) and way (a tile;
            None: after the product); the fastest is taken.
    """

    def __init__(self, how: How = "auto", buffer: int = BUFFER) -> None:
        self.how, self.buffer = how, buffer
        self.milliseconds: dict[tuple[int, ...], dict[Tile | None, float]] = {}
        self._seen: Counter[tuple[int, ...]] = Counter()

    def forget(self) -> None:
        """Measure anew, at each shape's third batch from now on."""
        self.milliseconds.clear()
        self._seen.clear()

    def fill(self, query: Query, best: Codes) -> None:
        """Write the exact best latents of all rows into codes."""
        self._fill(query, best, self._tile(query, best.values.shape[1]))

    def _fill(self, query: Query, best: Codes, tile: Tile | None) -> None:
        if tile is None:
            AfterProduct(query, self.buffer).fill((best, None))
        else:
            WithinProduct(query, tile).fill(best)

    def _tile(self, query: Query, k: int) -> Tile | None:
        (b, d), n = query.x.shape, len(query.b_enc)
        if self.how == "after" or not 0 < k <= MOST:
            return None
        if self.how == "within":
            return TILES[0]
        if not query.x.is_cuda or n < FEWEST:
            return None
        shape = (k, n, d, b.bit_length())
        # A trial waits for the device, which a step that is being recorded can't.
        if not torch.cuda.is_current_stream_capturing():
            self._seen[shape] += 1
            if self._seen[shape] in TRIED:
                self.milliseconds[shape] = self._trial(query, k)
        times = self.milliseconds.get(shape, {None: 0.0})
        return min(times, key=lambda tile: times[tile])

    def _trial(self, query: Query, k: int) -> dict[Tile | None, float]:
        right = empty_codes(query.x, k)
        times: dict[Tile | None, float] = {None: self._timed(query, right, None)}
        for tile in TILES:
            codes = empty_codes(query.x, k)
            try:
                taken = self._timed(query, codes, tile)
            except Exception:  # the card has too little memory for it, or whatever Triton raises
                continue
            if torch.equal(codes.indices, right.indices) and torch.equal(
                codes.values, right.values
            ):
                times[tile] = taken
            else:
                said = "selection within the product found other latents than after it, and is not used"
                warnings.warn(said, stacklevel=2)
        return times

    def _timed(self, query: Query, best: Codes, tile: Tile | None) -> float:
        self._fill(query, best, tile)  # compiles
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(ROUNDS):
            self._fill(query, best, tile)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / ROUNDS
