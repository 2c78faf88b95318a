"""Settings of a stage that would be passed over are refused, and a stage that can't begin leaves no run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llava_helpers import model_config, tiny_mpt
from llava_train_helpers import SMALL, data_options, pretrain, tiny_project

from llava_ext import deepspeed
from llava_ext.config import FinetuneConfig, ModelConfig
from llava_ext.deepspeed import state_bytes
from llava_ext.run import open_job, run
from llava_ext.stages import Finetune, LoraOptions
from llava_ext.training import LlavaTrainer


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("llava")
    return folder, tiny_project(folder)


def finetuning(project: tuple[Path, ModelConfig], out: Path, **lora: Any) -> FinetuneConfig:
    folder, model = project
    stage: Any = Finetune(**SMALL)  # type: ignore[arg-type]
    return FinetuneConfig(
        data=data_options(folder), model=model, out=out, stage=stage, lora=LoraOptions(**lora)
    )


@pytest.fixture
def own(tmp_path) -> Callable[..., Path]:
    """Writes a DeepSpeed JSON of the user's own."""

    def write(**parts: Any) -> Path:
        parts = {"zero_optimization": {"stage": 2}} | parts
        (tmp_path / "own.json").write_text(json.dumps(parts))
        return tmp_path / "own.json"

    return write


@pytest.mark.parametrize(
    ("settings", "parts", "said"),
    [
        ({"zero": 0}, {}, "`stage.deepspeed` is of DeepSpeed, and `stage.zero: 0` trains without"),
        ({"offload": True}, {}, "`stage.offload` does nothing beside your own"),
        ({"projector_rate": 1e-3}, {"optimizer": {"type": "Adam"}}, "`stage.projector_rate` does"),
        (
            {"schedule": "linear"},
            {"scheduler": {"type": "WarmupLR"}},
            "`stage.schedule` does nothing",
        ),
        (
            {"warmup": 0.5},
            {"scheduler": {"type": "WarmupLR"}},
            "`stage.warmup` does nothing beside",
        ),
        ({}, {"zero_optimization": True}, "that is an object with `stage` 0, 1, 2 or 3"),
        ({}, {"zero_optimization": {"stage": 4}}, "that is an object with `stage` 0, 1, 2 or 3"),
    ],
)
def test_what_a_deepspeed_json_takes_over_is_not_passed_over(
    project, tmp_path, own, settings, parts, said
) -> None:
    stage = {"zero": 2, "deepspeed": own(**parts)} | settings
    with pytest.raises(ValueError, match=said) as caught:
        run(pretrain(project, tmp_path / "run", stage=stage))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_offloading_without_deepspeed_is_refused(project, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"`stage.offload` is of DeepSpeed"):
        run(pretrain(project, tmp_path / "run", stage={"offload": True}))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"alpha": 3}, "`lora.alpha` is of an adapter, and `lora.rank: 0` trains all weights"),
        ({"dropout": 0.5}, "`lora.dropout` is of an adapter"),
        ({"targets": ("q_proj",)}, "`lora.targets` is of an adapter"),
        (
            {"rank": 2, "targets": ("q_proj", "all-linear")},
            "holds all-linear, which is every layer",
        ),
        (
            {"rank": 2, "targets": ("q_proj", "qproj")},
            "`lora.targets` names qproj, and no layer of",
        ),
        ({"rank": 2, "targets": ("qproj",)}, "`lora.targets` names qproj, and no layer of"),
    ],
)
def test_an_adapters_settings_are_not_passed_over(project, tmp_path, lora, said) -> None:
    with pytest.raises(ValueError, match=said):
        run(finetuning(project, tmp_path / "run", **lora))
    assert not (tmp_path / "run").exists()


def test_layers_are_named_by_their_ends(project, tmp_path) -> None:
    config = finetuning(project, tmp_path, rank=2, targets=("layers.1.mlp.up_proj", "q_proj"))
    job = open_job(config, "finetune")
    names = {name for name, each in job.model.named_parameters() if "lora_A" in name}
    where = {name.split(".lora_A")[0].partition("layers.")[2] for name in names}
    assert where == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}


def test_the_plan_says_the_stage_of_the_users_own_json(project, tmp_path, own, capsys) -> None:
    stage = {"zero": 3, "deepspeed": own(zero_optimization={"stage": 1}, bf16={"enabled": "auto"})}
    stage["deepspeed"].write_text(json.dumps(json.loads(stage["deepspeed"].read_text()) | AUTO))
    run(pretrain(project, tmp_path / "run", stage=stage))
    assert "ZeRO 1" in capsys.readouterr().out


AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def test_zero_1_shares_the_optimizers_state() -> None:
    assert state_bytes(100, 10, zero=1, processes=4) == 2 * 110 + 200 + 1200 // 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"attention": "flash_attention_2"},
            "`stage.attention: flash_attention_2` can't be had here",
        ),
        ({"track": ("no_such_tracker",)}, "no_such_tracker"),
    ],
)
def test_a_stage_that_cant_begin_leaves_no_run(project, tmp_path, wrong, said) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        run(pretrain(project, tmp_path / "run", stage=wrong))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*"))
    run(pretrain(project, tmp_path / "run"))  # the setting is put right: no resume, no other folder
    assert (tmp_path / "run" / "report.json").is_file()


def test_checkpoints_stay_where_they_were(project, tmp_path, monkeypatch) -> None:
    places = []
    save = LlavaTrainer._save_checkpoint
    monkeypatch.setattr(
        LlavaTrainer,
        "_save_checkpoint",
        lambda self, *rest: (places.append(self.args.output_dir), save(self, *rest)),
    )
    run(pretrain(project, tmp_path / "run"))
    assert set(places) == {str(tmp_path / "run" / "checkpoints")}


def test_attention_that_a_model_has_no_choice_of_is_refused(project, tmp_path) -> None:
    folder, model = project
    mpt = model_config(tiny_mpt(tmp_path / "mpt"), *model.towers, template="mpt")
    with pytest.raises(ValueError, match=r"MptForCausalLM can't compute attention by `stage.att"):
        run(pretrain((folder, mpt), tmp_path / "run", stage={"attention": "sdpa"}))
    config = pretrain((folder, mpt), tmp_path / "run", stage={"attention": "eager"})
    run(replace(config, limit=4))


@pytest.mark.parametrize("cpu", [True, False])
def test_on_cpus_gathered_weights_are_not_kept(monkeypatch, cpu: bool) -> None:
    """They lie in host memory there: two processes held more than one."""
    monkeypatch.setattr(deepspeed, "on_cpu", lambda: cpu)
    monkeypatch.setattr(deepspeed, "prepare", lambda **_: None)
    zero = deepspeed.deepspeed_settings(Finetune(zero=3))["zero_optimization"]
    kept = [zero.get(name) for name in deepspeed.LIVE]
    assert kept == [zero["stage3_prefetch_bucket_size"] if cpu else None] * 2
    two = deepspeed.zero_config(2, bfloat16=True, clip=1.0, cpu=cpu)
    assert not {*deepspeed.LIVE} & {*two["zero_optimization"]}
