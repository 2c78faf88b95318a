"""Rows to train on, in an order that the seed alone decides.

An epoch reads every row once. A set that fits in memory is shuffled as a whole; a larger one is read in
blocks of consecutive rows: the blocks are shuffled, a window of them is read, and its rows are shuffled
together. Where many consecutive rows are of one image (its cells), smaller blocks pass through a buffer of as
many rows: what comes in takes the places of rows drawn at random, which go out, so that a batch is of many
images. Readers in the background only read ahead: the order stays the plan's, whatever their number.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.config import TrainConfig
from revelio.seeds import generator

# Of rows that lie together by image, a block is this much smaller, so that the buffer holds more images.
GROUPED = 8


@runtime_checkable
class RowSource(Protocol):
    """Rows that can be read in slices, such as an activation store."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (b d)."""
        ...


@runtime_checkable
class Grouped(RowSource, Protocol):
    """Rows of which as many as ``group`` lie together that are of one image."""

    @property
    def group(self) -> int:
        """Rows an image."""
        ...


def group_of(rows: RowSource) -> int:
    """How many rows that lie together are of one image."""
    return rows.group if isinstance(rows, Grouped) else 1


@runtime_checkable
class Batches(Protocol):
    """What training reads: epochs of (b d) batches, the same each time they are asked for."""

    def epoch(self, index: int) -> Iterator[Float[Tensor, "b d"]]:
        """The batches of one epoch, in order."""
        ...


def batches_of(
    rows: Tensor | RowSource | Batches | Iterable[Tensor],
    config: TrainConfig,
    width: int | None = None,
) -> Batches:
    """Whatever rows were given, as epochs of batches.

    Args:
        rows: all rows (N d), a source of them, batches, or an iterable of (b d) that can be read again.
        config: the batches' size, the order's seed, up to what size a source is held in memory.
        width: of a row, where that is known; else one is read to see.
    """
    if isinstance(rows, Batches):
        return rows
    if not isinstance(rows, Tensor | RowSource):
        return InOrder(rows)
    if isinstance(rows, RowSource) and len(rows):
        width = width or rows.rows(0, 1).shape[1]
        if 4 * len(rows) * width <= config.memory_gib * 2**30:
            step = max(1, 1024 // group_of(rows)) * group_of(rows)
            rows = torch.cat([_block(rows, step, at) for at in range(0, len(rows), step)])
    return Shuffled(rows, config.batch_size, config.rows_seed, workers=config.workers)


class InOrder:
    """Batches that come ready from any iterable that can be read again and again."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = batches

    def epoch(self, index: int) -> Iterator[Float[Tensor, "b d"]]:
        """The iterable's own batches, whatever ``index`` is."""
        yield from self.batches


class Shuffled:
    """Batches of rows shuffled anew each epoch, keyed by (seed, epoch).

    Args:
        rows: all rows (N d), or a source to read them from.
        batch_size: rows a batch; the last one of an epoch may be smaller.
        seed: of the order.
        block: consecutive rows read at a time from a source.
        window: blocks held and shuffled together.
        workers: threads that read ahead.

    Raises:
        ValueError: there are no rows, or a size is not positive.
    """

    def __init__(
        self,
        rows: Tensor | RowSource,
        batch_size: int,
        seed: int = 0,
        *,
        block: int = 4096,
        window: int = 16,
        workers: int = 0,
    ) -> None:
        if min(batch_size, block, window) < 1 or workers < 0:
            raise ValueError(
                f"batch_size={batch_size}, block={block}, window={window}, workers={workers}: "
                "sizes must be at least 1 and workers at least 0"
            )
        if len(rows) == 0:
            raise ValueError("there are no rows to train on: extract activations first")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.block, self.window, self.workers = block, window, workers

    def over(self, rows: Tensor) -> "Shuffled":
        """The same batches, of rows that lie elsewhere."""
        return Shuffled(rows, self.batch_size, self.seed)

    def epoch(self, index: int) -> Iterator[Float[Tensor, "b d"]]:
        """The batches of epoch ``index``."""
        order = generator(self.seed, "k-sae rows", index)
        if isinstance(self.rows, Tensor):
            picks = torch.randperm(len(self.rows), generator=order).to(self.rows.device)
            for picked in picks.split(self.batch_size):
                yield self.rows[picked]
            return
        group = group_of(self.rows)
        size = self.block if group == 1 else max(1, self.block // GROUPED // group) * group
        starts = torch.arange(0, len(self.rows), size)
        starts = starts[torch.randperm(len(starts), generator=order)].tolist()
        # As many rows ahead, whatever a block's size.
        ahead = self.workers if group == 1 else self.workers * GROUPED
        blocks = _ahead(partial(_block, self.rows, size), starts, self.workers, ahead)
        if group == 1:
            windows = self._windows(blocks, len(starts), order)
        else:
            windows = _buffered(blocks, self.block * self.window, order)
        yield from _rebatch(windows, self.batch_size)

    def _windows(
        self, blocks: Iterator[Tensor], count: int, order: torch.Generator
    ) -> Iterator[Tensor]:
        for first in range(0, count, self.window):
            held = torch.cat([next(blocks) for _ in range(first, min(first + self.window, count))])
            yield held[torch.randperm(len(held), generator=order)]


def _block(source: RowSource, size: int, start: int) -> Tensor:
    return source.rows(start, min(start + size, len(source)))


def _buffered(blocks: Iterator[Tensor], size: int, order: torch.Generator) -> Iterator[Tensor]:
    """Rows in random order through a buffer of about ``size`` rows, which is all that is held."""
    first, count = [], 0
    for block in blocks:
        first.append(block)
        count += len(block)
        if count >= size:
            break
    held = torch.cat(first) if first else torch.empty(0)
    first.clear()
    for block in blocks:
        places = torch.randperm(len(held), generator=order)[: len(block)]
        leaving = held[places]
        held[places] = block
        yield leaving
    yield held[torch.randperm(len(held), generator=order)]


def _ahead(
    read: Callable[[int], Tensor], starts: list[int], workers: int, ahead: int
) -> Iterator[Tensor]:
    if workers == 0:
        yield from map(read, starts)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(read, start) for start in starts[:ahead]]
        for start in [*starts[ahead:], *[None] * len(pending)]:
            done = pending.pop(0).result()
            if start is not None:
                pending.append(pool.submit(read, start))
            yield done


def _rebatch(windows: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Cut windows into batches of ``size``; what is left of one goes before the next."""
    held, count = list[Tensor](), 0
    for window in windows:
        held.append(window)
        count += len(window)
        if count >= size:
            rows = torch.cat(held)
            whole = count - count % size
            yield from rows[:whole].split(size)
            held, count = [rows[whole:]], count - whole
    if count:
        yield torch.cat(held)
