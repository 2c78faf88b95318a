"""Rows to train on, in an order that the seed alone decides.

An epoch reads every row once. A set that fits in memory is shuffled as a whole; a larger one is read in
blocks of consecutive rows: the blocks are shuffled, a window of them is read, and its rows are shuffled
together. Readers in the background only read ahead: the order stays the plan's, whatever their number.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.config import TrainConfig
from revelio.seeds import generator


@runtime_checkable
class RowSource(Protocol):
    """Rows that can be read in slices, such as an activation store."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` (b d)."""
        ...


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
            starts = range(0, len(rows), 1024)
            rows = torch.cat([rows.rows(at, min(at + 1024, len(rows))) for at in starts])
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

    def epoch(self, index: int) -> Iterator[Float[Tensor, "b d"]]:
        """The batches of epoch ``index``."""
        order = generator(self.seed, "k-sae rows", index)
        if isinstance(self.rows, Tensor):
            picks = torch.randperm(len(self.rows), generator=order).to(self.rows.device)
            for picked in picks.split(self.batch_size):
                yield self.rows[picked]
            return
        yield from _rebatch(self._windows(order), self.batch_size)

    def _windows(self, order: torch.Generator) -> Iterator[Tensor]:
        source = self.rows
        assert not isinstance(source, Tensor)
        starts = torch.arange(0, len(source), self.block)
        starts = starts[torch.randperm(len(starts), generator=order)].tolist()

        def read(start: int) -> Tensor:
            return source.rows(start, min(start + self.block, len(source)))

        blocks = _ahead(read, starts, self.workers)
        for first in range(0, len(starts), self.window):
            held = torch.cat([next(blocks) for _ in starts[first : first + self.window]])
            yield held[torch.randperm(len(held), generator=order)]


def _ahead(read: Callable[[int], Tensor], starts: list[int], workers: int) -> Iterator[Tensor]:
    if workers == 0:
        yield from map(read, starts)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(read, start) for start in starts[:workers]]
        for start in [*starts[workers:], *[None] * len(pending)]:
            done = pending.pop(0).result()
            if start is not None:
                pending.append(pool.submit(read, start))
            yield done


def _rebatch(windows: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Cut windows into batches of ``size``; what is left of one goes before the next."""
    rest: Tensor | None = None
    for window in windows:
        held = window if rest is None else torch.cat([rest, window])
        whole = len(held) - len(held) % size
        if whole:
            yield from held[:whole].split(size)
        rest = held[whole:]
    if rest is not None and len(rest):
        yield rest
