"""The order of samples, batch sizes and stages of the LLaVA training."""

import os

import pytest

from llava_ext.sampler import StepSampler
from llava_ext.stages import Finetune, Pretrain
from llava_ext.training import (
    accumulation,
)


@pytest.mark.parametrize(
    ("effective", "batch", "processes", "times"), [(128, 16, 4, 2), (128, 4, 1, 32), (6, 3, 2, 1)]
)
def test_accumulation(effective: int, batch: int, processes: int, times: int) -> None:
    assert accumulation(effective, batch, processes) == times


def test_accumulation_must_divide() -> None:
    with pytest.raises(ValueError, match="3 processes times batch_size 16 = 48"):
        accumulation(128, 16, 3)


def test_stages_are_table_11() -> None:
    one, two = Pretrain(), Finetune()
    assert (one.learning_rate, two.learning_rate) == (2e-3, 2e-5)
    assert (one.zero, two.zero) == (2, 3)
    for stage in (one, two):
        assert (stage.effective_batch, stage.warmup, stage.weight_decay) == (128, 0.03, 0.0)
        assert (stage.schedule, stage.epochs, stage.clip) == ("cosine", 1.0, 1.0)


@pytest.mark.parametrize("by_length", [True, False])
def test_order_visits_everything_and_groups_lengths(by_length: bool) -> None:
    lengths = [1 + (7 * number) % 50 for number in range(203)]
    order = StepSampler(lengths, 8, 0, by_length=by_length)
    first = list(order)
    assert len(first) == len(order) == 208 and set(first) == set(range(203))
    assert first == list(order)
    order.epoch = 1
    assert first != list(order)
    padding = sum(
        max(lengths[i] for i in first[start : start + 8]) * 8
        - sum(lengths[i] for i in first[start : start + 8])
        for start in range(0, 208, 8)
    )
    assert (padding < 300) == by_length


def test_order_of_less_than_a_batch() -> None:
    assert sorted(StepSampler([5, 6, 7], 8, 0)) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_launcher_environment_is_not_left_behind() -> None:
    assert "RANK" not in os.environ
