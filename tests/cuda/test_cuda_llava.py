"""Both LLaVA stages and answers on CUDA."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
from device_helpers import check_answers
from llava_train_helpers import data_options, losses, tiny_project

from llava_ext.config import FinetuneConfig, PretrainConfig
from llava_ext.run import run
from llava_ext.stages import Finetune, Pretrain

SMALL = {"effective_batch": 4, "batch_size": 2, "zero": 0, "threads": 1, "save_steps": 2}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_stages_and_an_answer(tmp_path: Path, precision: str, monkeypatch) -> None:
    model = tiny_project(tmp_path)
    curves = []
    for device in ("cuda", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        out = tmp_path / f"{device}-pre"
        stage = Pretrain(**SMALL, precision=precision if device == "cuda" else "float32")  # type: ignore[arg-type]
        run(PretrainConfig(out=out, data=data_options(tmp_path), model=model, stage=stage))
        fine = FinetuneConfig(
            pretrained=out, out=tmp_path / f"{device}-fine", data=data_options(tmp_path), model=model,
            stage=Finetune(**SMALL, precision=stage.precision),  # type: ignore[arg-type]
        )  # fmt: skip
        run(replace(fine))
        curves.append(losses(out) + losses(fine.out))
        monkeypatch.undo()
    bound = 2e-3 if precision == "float32" else 5e-2
    assert curves[0] == pytest.approx(curves[1], rel=bound)
    check_answers(tmp_path / "cuda-fine" / "final", "cuda", exact=precision == "float32")
