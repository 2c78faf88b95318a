"""Commands on CUDA against the CPU: steering, measures of a k-SAE, gallery, purity; the demo to its end."""

import json
from pathlib import Path

import pytest
import torch
from device_helpers import COMMANDS, check_command, ran, write_few


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_few(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_is_near_the_cpu(name: str, made: Path, tmp_path: Path) -> None:
    check_command(name, made, tmp_path, "cuda")


def test_the_demo_comes_to_its_end(made: Path, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    out = ran("demo", made, tmp_path / "demo", "cuda")
    report = json.loads((out / "report.json").read_text())
    assert report["purity"] and (out / "report.html").is_file()
    assert torch.cuda.max_memory_allocated() > 0  # it was on the device
