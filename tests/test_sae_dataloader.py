import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revelio.sae.dataloader import InOrder, RowSource, Shuffled


class Source:
    """Rows 0, 1, 2, ... read in slices."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def rows(self, start: int, stop: int) -> torch.Tensor:
        assert 0 <= start < stop <= self.count
        return torch.arange(start, stop).float()[:, None]


def order(batches) -> list[int]:
    return [int(value) for batch in batches for value in batch[:, 0]]


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 60),
    size=st.integers(1, 20),
    block=st.integers(1, 16),
    window=st.integers(1, 4),
    workers=st.integers(0, 3),
)
def test_an_epoch_has_every_row_once_in_an_order_free_of_workers(
    count, size, block, window, workers
):
    streamed = Shuffled(Source(count), size, 3, block=block, window=window, workers=workers)
    batches = list(streamed.epoch(0))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert sorted(order(batches)) == list(range(count))
    alone = Shuffled(Source(count), size, 3, block=block, window=window)
    assert order(alone.epoch(0)) == order(batches)


def test_order_is_keyed_by_seed_and_epoch_only():
    rows = Source(500).rows(0, 500)
    first = order(Shuffled(rows, 64, 1).epoch(0))
    assert first == order(Shuffled(rows, 17, 1).epoch(0))
    assert first != order(Shuffled(rows, 64, 1).epoch(1))
    assert first != order(Shuffled(rows, 64, 2).epoch(0))
    assert first != sorted(first)
    assert sorted(first) == list(range(500))


def test_streams_are_shuffled_beyond_their_blocks():
    found = order(Shuffled(Source(400), 10, block=10, window=4).epoch(0))
    # A batch of ten that came from one block of ten would span less than ten.
    spans = [max(found[i : i + 10]) - min(found[i : i + 10]) for i in range(0, 400, 10)]
    assert sorted(spans)[len(spans) // 2] > 50


def test_a_source_is_known_by_what_it_can_do():
    assert isinstance(Source(3), RowSource)
    assert not isinstance(InOrder([]), RowSource)


def test_no_rows_and_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        Shuffled(torch.zeros(0, 3), 4)
    with pytest.raises(ValueError, match="batch_size=0"):
        Shuffled(torch.zeros(2, 3), 0)
