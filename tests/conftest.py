"""What every test shares: one thread (bit-equal results) and no network."""

import os
from collections.abc import Iterator
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test, or a library in it, sets in the environment is gone for the next one, in any order."""
    with patch.dict(os.environ):
        yield


# Modules that start launchers, or kill commands again and again. They are begun first, so that in the end no
# worker waits for one of them (with --no-loadscope-reorder).
LONGEST = (
    "test_llava_deepspeed.py",
    "test_llava_mpt.py",
    "test_sae_distributed.py",
    "test_diffc_distributed.py",
    "test_reproduce.py",
    "test_evaluation_command.py",
    "test_files_kills.py",
    "test_reliability.py",
    "test_files_commands.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
