"""QLoRA's wiring, without bitsandbytes; `tests/optional/check_quantised.py` trains with it."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llava_train_helpers import SMALL, data_options, tiny_project
from torch import nn

from llava_ext import language, run
from llava_ext.config import FinetuneConfig, PretrainConfig
from llava_ext.deepspeed import counts, memory, state_bytes
from llava_ext.stages import Finetune, LoraOptions, Pretrain


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    model = replace(tiny_project(tmp_path, records=4), dtype="bfloat16")
    stage = Finetune(**SMALL)  # type: ignore[arg-type]
    return FinetuneConfig(
        out=tmp_path / "fine",
        data=data_options(tmp_path),
        model=model,
        stage=stage,
        lora=LoraOptions(rank=2),
        load_in="8bit",
    )


def test_what_quantised_weights_cannot_do_is_one_line(config, tmp_path, monkeypatch) -> None:
    first = PretrainConfig(
        out=tmp_path / "pre", data=config.data, model=config.model, stage=Pretrain(), load_in="4bit"
    )
    with monkeypatch.context() as lacking:
        lacking.setattr("revelio.command_line.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"`load_in: 4bit` needs bitsandbytes, .*pip install"):
            run.run(replace(first, stage=replace(first.stage, zero=0)))
    monkeypatch.setattr("revelio.command_line.find_spec", lambda name: "there")
    zero = replace(config.stage, zero=3)
    for wrong, message in [
        (replace(config, lora=LoraOptions()), "stage 2 trains an adapter on it: set `lora.rank`"),
        (
            replace(config, load_in="4bit", validation_data=config.data.json),
            "train on them after it: leave `validation_data` out",
        ),
        (replace(config, stage=zero), "that ZeRO-3 can't share out: set `stage.zero: 2` or 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run.run(wrong)
        # DeepSpeed was made ready for the last of them: of that this process keeps nothing.
        assert not {"RANK", "MASTER_PORT", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"} & os.environ.keys()
    assert not config.out.exists()


def test_the_language_model_is_loaded_in_fewer_bits_and_nothing_of_it_trains(
    config, monkeypatch
) -> None:
    given, load = {}, language._of_transformers

    def plain(source, file, dtype, settings):
        given.update(settings)
        return load(source, file, dtype, {})

    monkeypatch.setattr(language, "_of_transformers", plain)
    model = run.open_job(config, "finetune").model
    assert given["quantization_config"].load_in_8bit and given["device_map"] == {"": "cpu"}
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert all(name.startswith("projectors.") or "lora_" in name for name in trained)


def test_memory_counts_packed_weights_as_they_are() -> None:
    """Bytes of two 4-bit weights each, and of one 8-bit weight, beside what trains and what is frozen."""
    model = nn.Module()
    model.trained = nn.Parameter(torch.zeros(10))
    model.frozen = nn.Parameter(torch.zeros(20), requires_grad=False)
    model.four = nn.Parameter(torch.zeros(15, 2, dtype=torch.uint8), requires_grad=False)
    model.eight = nn.Parameter(torch.zeros(40, dtype=torch.int8), requires_grad=False)
    assert counts(model) == (10 + 20 + 60 + 40, 10)
    # Without DeepSpeed frozen weights keep their own format, here float32; DeepSpeed has one for all.
    alone = memory(model, zero=0, processes=1, bfloat16=True)
    assert alone == 16 * 10 + 4 * 20 + 70
    shared = memory(model, zero=2, processes=2, bfloat16=True)
    assert shared == state_bytes(10, 20, zero=2, processes=2) + 70
