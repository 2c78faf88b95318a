"""Selection within the product, in Triton's interpreter on the CPU; skipped where Triton is not installed."""

import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from revelio.sae.kernels.base import Codes, Weights

if not find_spec("triton") or torch.cuda.is_available():
    pytest.skip("needs Triton and no CUDA device", allow_module_level=True)
if "triton" in sys.modules and not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("Triton was imported to compile", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from revelio.sae.kernels import cuda, cuda_search, cuda_within
from revelio.sae.kernels.cuda_within import Nomination, Tile, rank

# Masked lanes compute what is never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SMALL = Tile(16, 32, 16, 1, 1)


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """The interpreter sorts by loops, and multiplies whole tiles."""
    monkeypatch.setattr(cuda_search, "GROUPS", 64)
    monkeypatch.setattr(cuda_search, "WIDE", 64)
    monkeypatch.setattr(cuda_within, "GROUPS", 16)
    monkeypatch.setattr(cuda_within, "WIDE", 256)
    monkeypatch.setattr(cuda_within, "ROOM", 64)
    monkeypatch.setattr(cuda_within, "TILES", (SMALL,))


def drawn(seed: int, b: int, n: int, d: int, spread: float = 0.3) -> tuple[Weights, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(n, d, generator=draw)
    W_enc *= torch.exp(spread * torch.randn(n, 1, generator=draw))
    x = torch.randn(b, d, generator=draw) * torch.exp(3 * torch.randn(b, 1, generator=draw))
    return Weights(W_enc, 0.3 * torch.randn(n, generator=draw), W_enc, torch.zeros(d)), x


def best_of(weights: Weights, x: Tensor, k: int) -> Tensor:
    scores = x.double() @ weights.W_enc.double().T + weights.b_enc.double()
    return scores.topk(k).indices


def both(weights: Weights, x: Tensor, k: int) -> tuple[Codes, Codes]:
    after, _ = cuda.CudaKernel("after").encode(x, weights, k)
    within, _ = cuda.CudaKernel("within").encode(x, weights, k)
    return after, within


@pytest.fixture
def searched_anew(monkeypatch) -> list[int]:
    """How many images each call had to search after a product of their own."""
    found: list[int] = []
    put: Any = cuda_within.programs.put

    class Launch:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*values: Any, **options: Any) -> None:
                found.append(int((values[2] >= 0).sum()))
                put[grid](*values, **options)

            return launch

    monkeypatch.setattr(cuda_within.programs, "put", Launch())
    return found


@pytest.mark.parametrize(
    ("b", "n", "d", "k", "spread"),
    [(3, 700, 24, 4, 0.0), (2, 515, 33, 7, 1.0), (17, 256, 8, 1, 0.3), (1, 40, 16, 12, 0.3)],
    ids=["plain", "norms that differ", "more images than a tile", "k beyond the sample"],
)  # fmt: skip
def test_the_best_latents_are_found_with_the_bits_of_the_other_way(b, n, d, k, spread) -> None:
    weights, x = drawn(b, b, n, d, spread)
    after, within = both(weights, x, k)
    assert torch.equal(within.indices, best_of(weights, x, k))
    assert torch.equal(within.indices, after.indices)
    assert torch.equal(within.values, after.values)


def test_equal_scores_go_to_the_lower_latent() -> None:
    weights, x = drawn(0, 2, 300, 16)
    rows = weights.W_enc[torch.arange(300) % 60].contiguous()
    equal = Weights(rows, torch.zeros(300), rows, weights.b_dec)
    _, within = both(equal, x, 8)
    scores = x.double() @ rows.double().T
    wanted = (-scores).sort(dim=1, stable=True).indices[:, :8]
    assert torch.equal(within.indices, wanted)


def test_chunks_of_images_are_those_of_all_at_once(monkeypatch) -> None:
    weights, x = drawn(3, 5, 300, 16)
    monkeypatch.setattr(cuda_within, "WithinProduct", _in_chunks(2))
    after, within = both(weights, x, 3)
    assert torch.equal(after.indices, within.indices) and torch.equal(after.values, within.values)


def _in_chunks(images: int) -> Callable[..., Any]:
    real = cuda_within.WithinProduct
    return lambda query, tile: real(query, tile, images)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda patch: patch.setattr(cuda_within.WithinProduct, "_guess", _too_high),
        lambda patch: patch.setattr(cuda_within, "WIDE", 8),
        lambda patch: patch.setattr(cuda_within, "ROOM", 4),
    ],
    ids=["a guess above the k-th best", "no room in the product", "no room after it"],
)
@pytest.mark.parametrize("spare", [1, 100], ids=["searched after a product", "in float32"])
def test_what_is_not_certain_is_searched_anew(monkeypatch, searched_anew, spoil, spare) -> None:
    weights, x = drawn(5, 4, 300, 16)
    x = x[:1] * torch.arange(1, 5)[:, None] + 1e-3
    # The best latents lie so close that their bounds overlap: more candidates than k.
    near = weights.W_enc.clone()
    near[::3] = 9 * x[0] / x[0].norm() * (1 + 1e-5 * torch.arange(100)[:, None])
    weights = Weights(near, weights.b_enc * 0, near, weights.b_dec)
    spoil(monkeypatch)
    monkeypatch.setattr(cuda_within, "SPARE", spare)
    _, within = both(weights, x, 3)
    assert torch.equal(within.indices, best_of(weights, x, 3))
    assert searched_anew == [4 if spare == 1 else 1]


def _too_high(search: Any, query: Any, k: int) -> Tensor:
    return torch.full((len(query.x),), 1e30)


def test_bits_do_not_tell_which_rows_had_too_many_candidates(monkeypatch) -> None:
    """Sums of all latents, some at a time, are in another order than those of candidates."""
    monkeypatch.setattr(cuda_search, "WIDE", 16)
    monkeypatch.setattr(cuda_within, "ROOM", 16)
    draw = torch.Generator().manual_seed(0)
    x, rows = torch.randn(2, 200, generator=draw), torch.randn(300, 200, generator=draw) / 10
    near = x.mean(0) / x.mean(0).norm() * (1 + 1e-4 * torch.arange(60)[:, None])
    rows[::5] = near + 1e-4 * torch.randn(60, 200, generator=draw)
    weights = Weights(rows, torch.zeros(300), rows, torch.zeros(200))
    after, within = both(weights, x, 3)
    assert torch.equal(within.indices, best_of(weights, x, 3))
    assert torch.equal(within.indices, after.indices)
    assert torch.equal(within.values, after.values)
    monkeypatch.setattr(cuda_search, "WIDE", 128)  # all fit
    fitting, _ = cuda.CudaKernel("after").encode(x, weights, 3)
    assert torch.equal(fitting.indices, after.indices)
    assert torch.equal(fitting.values, after.values)


def test_rows_without_a_bound_are_searched_anew(searched_anew) -> None:
    weights, x = drawn(6, 3, 200, 16)
    weights.W_enc[5] *= 1e6  # float16 does not hold it
    _, within = both(weights, x, 3)
    assert torch.equal(within.indices, best_of(weights, x, 3))
    assert searched_anew == [1]


def test_most_guesses_hold(searched_anew) -> None:
    """A rank of the sample that is seldom too high, and not so low that most of the latents are kept."""
    weights, x = drawn(7, 8, 1024, 16)
    both(weights, x, 4)
    assert searched_anew == [0]
    assert rank(32) * cuda_within.EVERY < 200
    draw = torch.Generator().manual_seed(0)
    inside = (torch.rand(100_000, 32, generator=draw) < 1 / cuda_within.EVERY).sum(1)
    assert (inside > rank(32)).double().mean() < 1e-4


class Timed(Nomination):
    """Times that are told, for ways that may fail or find something else."""

    def __init__(self, told: Mapping[Tile | None, float | Exception]) -> None:
        super().__init__()
        self.told = told

    def _timed(self, query: Any, best: Codes, tile: Tile | None) -> float:
        best.values.zero_()
        best.indices.fill_(1 if tile == WRONG else 0)
        took = self.told[tile]
        if isinstance(took, Exception):
            raise took
        return took


BIG, WRONG = Tile(128, 256, 64, 8, 3), Tile(1, 1, 1, 1, 1)


@pytest.fixture
def card(monkeypatch) -> Callable[[], Any]:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = SimpleNamespace(shape=(8, 4), is_cuda=True, device="cpu", __len__=lambda: 8)
    return lambda: SimpleNamespace(x=x, b_enc=range(cuda_within.FEWEST))


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ({None: 2.0, BIG: 1.0, SMALL: 1.5}, BIG),
        ({None: 2.0, BIG: RuntimeError("out of resources"), SMALL: 1.5}, SMALL),
        ({None: 1.0, BIG: 1.5, SMALL: 1.5}, None),
        ({None: 2.0, BIG: torch.OutOfMemoryError(), SMALL: 3.0}, None),
    ],
)
def test_the_faster_way_is_taken(monkeypatch, card, told, taken) -> None:
    monkeypatch.setattr(cuda_within, "TILES", (BIG, SMALL))
    monkeypatch.setattr(cuda_within, "empty_codes", lambda x, k: _codes())
    nomination = Timed(told)
    chosen = [nomination._tile(card(), 2) for _ in range(4)]
    assert chosen == [None, None, taken, taken]
    nomination.told = {None: 1.0, BIG: 2.0, SMALL: 0.5}
    nomination.forget()
    assert [nomination._tile(card(), 2) for _ in range(3)] == [None, None, SMALL]


def test_another_result_is_said_and_not_used(monkeypatch, card) -> None:
    monkeypatch.setattr(cuda_within, "TILES", (WRONG,))
    monkeypatch.setattr(cuda_within, "empty_codes", lambda x, k: _codes())
    nomination = Timed({None: 2.0, WRONG: 1.0})
    with pytest.warns(UserWarning, match="found other latents than after it, and is not used"):
        assert [nomination._tile(card(), 2) for _ in range(3)] == [None] * 3


def _codes() -> Codes:
    return Codes(torch.empty(8, 2), torch.empty(8, 2, dtype=torch.int64))
