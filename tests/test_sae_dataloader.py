from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from revelio.sae import feeding
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


@pytest.fixture
def pretended(monkeypatch) -> list[Any]:
    """A CUDA device that is the CPU: what is asked of it, in order; 4,000 bytes of it are free."""
    done, lanes = list[Any](), ["compute"]

    class Stream:
        def record_event(self) -> int:
            done.append(("sent", sum(each[0] == "sent" for each in done)))
            return done[-1][1]

        def wait_event(self, event: int) -> None:
            assert lanes[-1] == "compute"
            done.append(("awaited", event))

    @contextmanager
    def stream(lane):
        lanes.append("copies")
        yield
        lanes.pop()

    def pinned(self: Tensor) -> Tensor:
        assert lanes[-1] == "copies"
        done.append(("pinned", len(self)))
        return self

    def to(self: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        if torch.device(device).type == "cpu":
            return self
        assert non_blocking == (lanes[-1] == "copies")
        done.append(("moved", len(self)))
        return self

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 9999))
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(
        Tensor, "record_stream", lambda self, used: done.append(("kept", len(self)))
    )
    return done


CARD = torch.device("cuda", 0)


def test_batches_are_copied_one_ahead_and_awaited_each_by_itself(pretended) -> None:
    batches = Shuffled(Source(50), 20, 3, block=8, window=2)
    wanted = order(batches.epoch(1))
    fed = feeding.fed(batches, CARD).epoch(1)
    found = [next(fed)]
    one = [("pinned", 20), ("moved", 20)]
    assert pretended == [*one, ("sent", 0), *one, ("sent", 1), ("awaited", 0), ("kept", 20)]
    found += list(fed)
    assert order(found) == wanted
    assert [each for each in pretended if each[0] == "awaited"] == [
        ("awaited", i) for i in range(3)
    ]


@pytest.mark.parametrize(("count", "stays"), [(500, False), (501, True)])
def test_rows_that_take_half_of_what_is_free_lie_on_the_device(pretended, count, stays) -> None:
    batches = Shuffled(Source(count).rows(0, count), 64, 5)
    wanted = order(batches.epoch(2))
    fed = feeding.fed(batches, CARD)
    assert isinstance(fed, feeding.Overlapped) == stays
    assert pretended == ([] if stays else [("moved", count)])
    assert order(fed.epoch(2)) == wanted
    assert pretended[0] == (("pinned", 64) if stays else ("moved", count))


def test_on_a_cpu_batches_are_fed_as_they_are() -> None:
    batches = InOrder([])
    assert feeding.fed(batches, torch.device("cpu")) is batches
