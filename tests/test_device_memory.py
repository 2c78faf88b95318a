"""A device whose memory a model goes beyond, pretended on the CPU: one line with sizes and settings."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones_helpers import tiny_clip, tiny_sd
from command_helpers import fails
from device_helpers import load_own
from torch import nn

from revelio.backbones.loading import reading
from revelio.backbones.registry import load_backbone
from revelio.device_memory import largest
from revelio.machine import beyond_memory, size
from revelio.pipelines.inputs import open_sae
from revelio.sae.model import KSparseAutoencoder

FREE = 123_000_000
CPU = torch.device("cpu")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make memory run out when a model of a class is put onto the device."""
    plain = nn.Module.to

    def fill(kind: str) -> None:
        def to(model: nn.Module, *given: Any, **named: Any) -> nn.Module:
            if type(model).__name__ == kind and CPU in (*given, *named.values()):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return plain(model, *given, **named)

        monkeypatch.setattr(nn.Module, "to", to)
        monkeypatch.setattr("revelio.device_memory.room", lambda _: FREE)

    yield fill


def taken(*models: nn.Module) -> str:
    tensors = (each for model in models for each in (*model.parameters(), *model.buffers()))
    return size(sum(each.numel() * each.element_size() for each in tensors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "UNet2DConditionModel", "CLIPTextModel"])
def test_a_backbone_says_what_all_its_parts_take(
    tmp_path: Path, full, kind: str, dtype: str
) -> None:
    """Whichever of them is the one that no longer fits."""
    settings = {"layers": ["up_ft1"], "device": "cpu", "dtype": dtype}
    name = str(tiny_sd(tmp_path / "sd"))
    model = load_backbone(name, **settings)
    wanted = taken(model.unet, model.latents.vae, model.text._model)  # type: ignore[attr-defined]
    full(kind)
    with pytest.raises(ValueError, match="does not fit the device's memory") as said:
        load_backbone(name, **settings)
    line = str(said.value)
    assert f"in {dtype} " in line and "123 MB are free" in line
    assert f"take about {wanted}, of which" in line
    assert ("bfloat16 as the backbone's dtype" in line) == (dtype == "float32")
    assert "an earlier layer" in line and "cpu" in line and "\n" not in line and "--" not in line


def test_a_whole_vit_and_ones_own_backbone(tmp_path: Path, full, monkeypatch) -> None:
    name = str(tiny_clip(tmp_path / "clip"))
    model = load_backbone(name, device="cpu")
    full("CLIPVisionModel")
    with pytest.raises(ValueError, match="are free") as said:
        load_backbone(name, device="cpu")
    assert taken(model.network) in str(said.value)  # type: ignore[attr-defined]
    assert "earlier layer" not in str(said.value)

    def own(*, device: str, **settings: object) -> object:
        if device == "meta":
            raise TypeError("a place that this model has never heard of")
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("device_helpers.load_own", own)
    with pytest.raises(ValueError, match="memory: 123 MB are free; take bfloat16"):
        load_backbone(f"device_helpers:{load_own.__name__}", device="cpu")


def test_the_command_says_it_in_one_line(tmp_path: Path, full, capsys) -> None:
    name = str(tiny_sd(tmp_path / "sd"))
    full("UNet2DConditionModel")
    words = ["--data.source", "samples", "--backbone.name", name, "--backbone.device", "cpu"]
    said = fails(capsys, "extract", *words, "--out", tmp_path / "out")
    assert "its weights take about" in said and "take bfloat16 as the backbone's dtype" in said
    assert not list((tmp_path / "out").glob("*"))


def test_a_ksae_that_does_not_fit(tmp_path: Path, full) -> None:
    KSparseAutoencoder(8, 64, 4, seed=0).save_pretrained(tmp_path / "ksae")
    full("KSparseAutoencoder")
    with pytest.raises(
        ValueError, match=r"the k-SAE at .* does not fit the device's memory"
    ) as said:
        open_sae(tmp_path / "ksae", "cpu")
    assert size(4 * (2 * 64 * 8 + 64 + 8)) in str(said.value)


def test_reading_blames_no_file_for_a_full_device() -> None:
    with pytest.raises(torch.OutOfMemoryError), reading("config.json of x"):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("holds", range(9))
def test_the_largest_of_descending_sizes(holds: int) -> None:
    tried = []

    def run(size: int) -> None:
        tried.append(size)
        if size > holds:
            raise torch.OutOfMemoryError

    assert largest([8, 4, 2, 1], run) == max((n for n in (1, 2, 4, 8) if n <= holds), default=0)
    assert tried == [n for n in (8, 4, 2, 1) if n > holds] + [tried[-1]] * (holds > 0)


def test_memory_that_runs_out_elsewhere_names_the_commands_own_flags(
    monkeypatch, capsys, tmp_path
) -> None:
    def runs_out(*_given: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which "
            "1.00 GiB is free. Including non-PyTorch memory, this process has 6.90 GiB memory in use."
        )

    monkeypatch.setattr("revelio.pipelines.pca_maps.pca_maps", runs_out)
    said = fails(capsys, "pca-maps", "--out", tmp_path / "out")
    assert "Tried to allocate 2.00 GiB" in said and "1.00 GiB is free;" in said
    assert "lower --batch-size or --backbone.image-size, or set --backbone.dtype bfloat16" in said
    assert beyond_memory(MemoryError()) == (
        "this does not fit: MemoryError; choose smaller sizes or batches"
    )
    assert beyond_memory(RuntimeError("of another kind")) is None
