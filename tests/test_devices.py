"""What tests/cuda checks on a GPU, on the CPU: the bodies of those tests are run where there is no GPU."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones_helpers import tiny_dit, tiny_sd
from device_helpers import (
    COMMANDS,
    FAMILIES,
    SHIPPED,
    TRAININGS,
    check_answers,
    check_automatic_batch,
    check_command,
    check_compiled,
    check_diff_c,
    check_family,
    check_near,
    check_store,
    check_training,
    write_few,
)
from llava_helpers import write_answering

from revelio.sae.kernels.sparse import SparseKernel


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_in_bfloat16_is_near_float32(tmp_path: Path, family: str) -> None:
    check_family(family, tmp_path, "cpu", "bfloat16")


@pytest.mark.parametrize("family", ["packaged", "own"])
def test_models_of_other_origin_in_float16_are_near_float32(tmp_path: Path, family: str) -> None:
    check_family(family, tmp_path, "cpu", "float16")


@pytest.mark.parametrize("name", list(SHIPPED))
def test_shipped_models_in_float16_are_near_float32(name: str) -> None:
    layers, timestep = SHIPPED[name]
    check_near(name, layers, timestep, "cpu", "float16")


@pytest.mark.parametrize(("name", "dtype"), [("mini-sd", "bfloat16"), ("mini-clip", "float16")])
def test_a_store_in_fewer_bits_holds_float32_s_rows(tmp_path: Path, name: str, dtype: str) -> None:
    check_store(name, SHIPPED[name][0], tmp_path, "cpu", dtype)


def test_an_extraction_with_compile_stores_what_one_without_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as on a GPU, then run as it stands: no code is generated."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = str(tiny_dit(tmp_path / "dit"))
    check_compiled(model, ("block1", "block3"), tmp_path, "cpu", "bfloat16")


def test_an_extraction_chooses_its_batch_size(tmp_path: Path) -> None:
    check_automatic_batch(str(tiny_sd(tmp_path / "sd")), ("up_ft1",), tmp_path, "cpu")


@pytest.mark.parametrize("changes", TRAININGS, ids=str)
def test_training_equals_the_dense_kernel(changes: dict[str, Any]) -> None:
    check_training(changes, "cpu", SparseKernel())


def test_diff_c_learns() -> None:
    check_diff_c("cpu")


def test_answers_alone_are_those_of_a_batch(tmp_path: Path) -> None:
    write_answering(tmp_path)
    check_answers(tmp_path / "final", "cpu", exact=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_few(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_gives_numbers_to_compare(name: str, made: Path, tmp_path: Path) -> None:
    check_command(name, made, tmp_path, "cpu")


def test_the_extraction_benchmark_takes_a_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from extraction_cuda import fitting

    assert [fitting(free, 512) for free in (79.0, 13.6, 11.0, 5.0)] == [32, 32, 16, 2]
    assert fitting(5.0, 256) == 8
