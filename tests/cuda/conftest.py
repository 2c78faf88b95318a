"""Tests on a CUDA device against the CPU; `make gpu-check` runs them. Skipped where there is none."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cuda")
            if not torch.cuda.is_available():
                item.add_marker(skip)


def pytest_sessionfinish() -> None:
    """Tell `make gpu-check` the most GPU memory that was held."""
    if (place := os.environ.get("REVELIO_GPU_PEAK")) and torch.cuda.is_available():
        Path(place).write_text(f"{torch.cuda.max_memory_allocated() / 2**30:.3f}")


@pytest.fixture(autouse=True)
def plain_products() -> None:
    """Float32 products in float32: what the bounds below are for."""
    torch.backends.cuda.matmul.allow_tf32 = False
