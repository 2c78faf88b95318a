"""What the tests of the certified search share: every instruction set, and the choice by brute force."""

import platform

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from sae_same_order import dots

from revelio.sae.kernels.base import Codes, Weights
from revelio.sae.kernels.build import ARM, INSTRUCTION_SETS, instruction_set

ON_ARM = platform.machine().lower() in ARM

# The environment stays for all examples of a test, as it should.
many = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=[name for name in INSTRUCTION_SETS if name.startswith("neon") == ON_ARM])
def instructions(request, monkeypatch) -> str:
    """Every test on every instruction set that this computer has."""
    monkeypatch.setenv("REVELIO_NATIVE", request.param)
    if instruction_set() != request.param:
        pytest.skip(f"this processor has no {request.param}")
    return request.param


def weights_of(W_enc: torch.Tensor, b_enc: torch.Tensor | None = None) -> Weights:
    n, d = W_enc.shape
    bias = torch.zeros(n) if b_enc is None else b_enc
    return Weights(W_enc, bias, torch.zeros(n, d), torch.zeros(d))


def scores_of(x: torch.Tensor, weights: Weights) -> np.ndarray:
    w = weights.W_enc.numpy()
    with np.errstate(over="ignore"):
        return np.stack([dots(row, w) for row in x.numpy()]) + weights.b_enc.numpy()


def assert_chosen(codes: Codes, scores: np.ndarray, k: int) -> None:
    """The k largest, ties to the lower index, bit for bit."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert np.array_equal(codes.indices.numpy(), order)
    assert np.array_equal(codes.values.numpy(), np.take_along_axis(scores, order, 1))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
