"""The kernel distance of samples: against loops and a closed form, and its page."""

import pytest
import torch

from tools.mini.distance import half_sized, kernel_distance, with_interval
from tools.mini.page import distance_part


def draws(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_distance_equals_a_loop() -> None:
    a, b = draws(7, 0), draws(5, 1)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (float(x.double() @ y.double()) / 6 + 1) ** 3

    def within(x: torch.Tensor) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
        return sum(kernel(x[i], x[j]) for i, j in pairs) / len(pairs)

    across = sum(kernel(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(within(a) + within(b) - 2 * across)


def test_the_same_distribution_is_at_zero_and_another_is_not() -> None:
    """Of N(0, 1) and N(s, 1) the linear kernel alone gives s^2; the cubic one gives more."""
    same = with_interval(draws(400, 0), draws(400, 1))
    assert same["low"] < 0 < same["high"]
    apart = with_interval(draws(400, 0), draws(400, 1, shift=1.0))
    assert apart["low"] > 3  # 3 s^2 from the kernel's linear term


def test_half_the_resolution_keeps_what_has_no_detail() -> None:
    flat = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    assert torch.equal(half_sized(flat), flat)
    checks = (torch.arange(8)[:, None] % 2 * 255).to(torch.uint8).expand(1, 3, 8, 8)
    assert float(half_sized(checks).float().std()) < 0.6 * float(checks.float().std())


def test_the_page_says_what_accuracy_does_not() -> None:
    entry = {"value": 1.234, "low": 1.0, "high": 2.0}
    figures = {"features": "v", "side": 112, "images": 9, "blocks": 3, "guidance": 3.0, "steps": 25}
    text = distance_part(figures | {"distance": {"samples": entry}})
    assert "accuracy on samples does not show their quality" in text
    assert "| samples | 1.23 [1.00, 2.00] |" in text
