"""Backbones, extraction, Diff-C and LLaVA on CUDA against the CPU, within stated bounds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones_helpers import picture
from device_helpers import (
    BOUNDS,
    FAMILIES,
    SHIPPED,
    check_automatic_batch,
    check_compiled,
    check_diff_c,
    check_family,
    check_near,
    check_store,
)

from revelio import ActivationStore, load_backbone, open_dataset
from revelio.activations.config import ExtractConfig
from revelio.activations.extract import run
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.fitting import largest_batch
from revelio.backbones.compiled import compile_backbone


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_tiny_models_are_near_the_cpu(tmp_path: Path, family: str, dtype: str) -> None:
    check_family(family, tmp_path, "cuda", dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", list(SHIPPED))
def test_shipped_models_are_near_the_cpu(name: str, dtype: str) -> None:
    layers, timestep = SHIPPED[name]
    check_near(name, layers, timestep, "cuda", dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", list(SHIPPED))
def test_a_store_made_on_cuda_holds_the_cpus_rows(tmp_path: Path, name: str, dtype: str) -> None:
    check_store(name, SHIPPED[name][0], tmp_path, "cuda", dtype)


def test_a_compiled_backbone_is_near_the_plain_one() -> None:
    found = []
    for compiles in (False, True):
        backbone = load_backbone("mini-sd", layers=["up_ft1"], device="cuda")
        if compiles:
            compile_backbone(backbone)
        pixels = torch.stack([backbone.transform(picture(i)) for i in range(4)])
        settings = {"layers": ["up_ft1"], "timestep": 25}
        found += [backbone.activations(backbone.encode(pixels), list("abcd"), **settings)["up_ft1"]]
    assert (found[0] - found[1]).norm() / found[0].norm() < BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_extraction_with_compile_stores_what_one_without_does(
    tmp_path: Path, dtype: str
) -> None:
    check_compiled("mini-sd", ("bottleneck", "up_ft1"), tmp_path, "cuda", dtype)


def test_an_extraction_finds_its_batch_size(tmp_path: Path) -> None:
    check_automatic_batch("mini-sd", ("up_ft1",), tmp_path, "cuda")


def test_the_batch_that_fits_is_found_and_named(tmp_path: Path) -> None:
    backbone = load_backbone("mini-sd", layers=["up_ft1"], device="cuda")
    config = ExtractConfig(layers=("up_ft1",), batch_size=512, shard_rows=512)
    job = ExtractionPlan(open_dataset("samples", limit=600), backbone, tmp_path, config)
    whole = largest_batch(job)
    assert whole.size == 256 and whole.image_bytes > 0
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 40 * whole.image_bytes
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(
            ValueError, match=r"batch_size 512 goes beyond .*resume with batch_size"
        ):
            for _ in run(job):
                pass
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for _ in run(replace(job, resume=True).with_settings(batch_size=16)):
        pass
    assert len(ActivationStore.open(job.stores[0])) == 600


def test_diff_c_learns_as_on_the_cpu() -> None:
    check_diff_c("cuda")
