"""Backbones, extraction, Diff-C and LLaVA on CUDA against the CPU, within stated bounds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones_helpers import picture
from device_helpers import BOUNDS, FAMILIES, SHIPPED, check_family, check_near
from diffc_helpers import separable

from revelio import ActivationStore, extract, load_backbone, open_dataset
from revelio.activations.config import ExtractConfig
from revelio.activations.extract import run
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.fitting import largest_batch
from revelio.backbones.compiled import compile_backbone
from revelio.diffc.config import FitConfig
from revelio.diffc.model import DiffC
from revelio.diffc.sources import TensorGrids
from revelio.diffc.train import Training, train


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_tiny_models_are_near_the_cpu(tmp_path: Path, family: str, dtype: str) -> None:
    check_family(family, tmp_path, "cuda", dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("name", list(SHIPPED))
def test_shipped_models_are_near_the_cpu(name: str, dtype: str) -> None:
    layers, timestep = SHIPPED[name]
    check_near(name, layers, timestep, "cuda", dtype)


def test_a_store_made_on_cuda_holds_the_cpus_rows(tmp_path: Path) -> None:
    images = open_dataset("samples", limit=40)
    stores = {}
    for device in ("cpu", "cuda"):
        backbone = load_backbone("mini-sd", layers=["bottleneck", "up_ft1"], device=device)
        paths = extract(
            images, backbone, tmp_path / device, layers=["bottleneck", "up_ft1"],
            timesteps=[25, 200], batch_size=16, workers=2,
        )  # fmt: skip
        stores[device] = [ActivationStore.open(path) for path in paths]
    for cpu, cuda in zip(stores["cpu"], stores["cuda"], strict=True):
        assert list(cpu.ids) == list(cuda.ids)
        error = (cpu.tensor() - cuda.tensor()).norm() / cpu.tensor().norm()
        assert error < BOUNDS["float32"]


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
    every, labels = separable(16)
    found = {}
    settings = FitConfig(epochs=6, batch_size=8, learning_rate=1e-3, validation=0.0)
    for device in ("cpu", "cuda"):
        model = DiffC(6, 3, width=16, seed=3).to(device)
        training = Training.start(model, settings)
        for _state in train(training, TensorGrids([every], labels), range(len(labels)), settings):
            pass
        with torch.no_grad():
            found[device] = model.eval()(every.to(device)).cpu()
    assert (found["cuda"].argmax(1) == torch.tensor(labels)).float().mean() > 0.9
    assert (found["cuda"] - found["cpu"]).norm() / found["cpu"].norm() < 2e-2
