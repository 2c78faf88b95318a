"""A stage in this process: what changes, what is printed, resume, the cache, bad settings."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llava_helpers import tiny_llama, tiny_mpt
from llava_train_helpers import (
    SMALL,
    data_options,
    losses,
    pretrain,
    record,
    tiny_project,
    write_data,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llava_ext import run as stage_run
from llava_ext.config import (
    FinetuneConfig,
    ModelConfig,
)
from llava_ext.model import LlavaModel
from llava_ext.run import open_job, run
from llava_ext.sampler import StepSampler
from llava_ext.stages import Finetune, LoraOptions, Pretrain
from llava_ext.towers import load_towers, tower_bytes
from llava_ext.training import (
    EpochCallback,
    LlavaTrainer,
    build_trainer,
    training_arguments,
)
from revelio.machine import size
from revelio.run_dir import read_json


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("llava")
    return folder, tiny_project(folder)


def test_pretrain_changes_projectors_only(project, tmp_path, capsys) -> None:
    config = pretrain(project, tmp_path / "pre")
    before = open_job(config, "pretrain").model.state_dict()
    run(config)
    printed = capsys.readouterr().out
    model = LlavaModel.from_pretrained(tmp_path / "pre" / "final")
    after = model.state_dict()
    for name, value in before.items():
        same = torch.equal(value, after[name])
        assert same != name.startswith("projectors."), name
    assert not (tmp_path / "pre" / "final" / "language_model").exists()
    assert "effective batch: 4 = 1 process x 2 samples x 2 accumulated" in printed
    trained = sum(value.numel() for name, value in before.items() if name.startswith("projectors."))
    last = tmp_path / "pre" / "checkpoints" / "checkpoint-4"
    tensors = torch.load(last / "optimizer.pt", weights_only=True)["state"].values()
    held = sum(t.nbytes for one in tensors for name, t in one.items() if name != "step")
    held += sum(t.nbytes for t in load_file(last / "trained.safetensors").values())
    written = load_file(tmp_path / "pre" / "final" / "projectors.safetensors").values()
    said = f"checkpoints of {size(held)}, at most 2 at once; the model "
    assert said + size(sum(t.nbytes for t in written)) in printed
    # Without DeepSpeed and in float32: four bytes a frozen weight, sixteen one that trains; towers beside.
    frozen = sum(value.numel() for value in model.parameters()) - trained
    said = f"memory of a process: {size(4 * frozen + 16 * trained)} of weights, gradients and optimiser, "
    towers = load_towers(project[1], "cpu")
    assert said + f"{size(sum(map(tower_bytes, towers)))} of towers, and" in printed
    parts = [vars(tower.backbone) for tower in towers]  # type: ignore[attr-defined]
    assert sum(map(tower_bytes, towers)) >= sum(
        p.nbytes for own in parts for m in own.values() if isinstance(m, torch.nn.Module)
        for p in m.parameters()
    )  # fmt: skip
    assert f"{trained:,} train" in printed and "frozen, outside the model" in printed
    assert read_json(tmp_path / "pre" / "report.json")["trained_parameters"] == trained
    curve = losses(tmp_path / "pre")
    assert len(curve) == 4 and curve[-1] < curve[0]


def test_records_that_cannot_be_masked_are_bad_records(project, tmp_path) -> None:
    """Of the data and of the validation data."""
    wrong = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "<|im_end|>"}]
    records = [record(n) for n in range(6)]
    for number in (1, 4):
        records[number] = {"id": f"tag{number}", "conversations": wrong}
    path = write_data(tmp_path / "tags.json", records)
    model = replace(project[1], template="mpt")
    config = pretrain((project[0], model), tmp_path / "out")
    for changed in (
        replace(config, data=replace(config.data, json=path)),
        replace(config, validation_data=path),
    ):
        with pytest.raises(ValueError, match=r"tags\.json: 2 of 6 .*'tag1'.*'tag4'"):
            open_job(changed, "pretrain")
        with pytest.warns(UserWarning, match=r"tags\.json: left out: 2 of 6 .*'tag1'.*'tag4'"):
            job = open_job(replace(changed, bad_records="skip"), "pretrain")
        found = job.validation or job.dataset
        assert [found[n]["id"] for n in range(len(found))] == ["r0", "r2", "r3", "r5"]


def test_finetune_changes_the_language_model_and_starts_from_stage_1(project, tmp_path) -> None:
    folder, model = project
    run(pretrain(project, tmp_path / "pre"))
    config = FinetuneConfig(
        pretrained=tmp_path / "pre",
        out=tmp_path / "fine",
        data=data_options(folder),
        model=model,
        stage=Finetune(**SMALL),  # type: ignore[arg-type]
    )
    projectors = load_file(tmp_path / "pre" / "final" / "projectors.safetensors")
    started = open_job(config, "finetune").model
    for name, value in started.projectors.state_dict().items():
        assert torch.equal(value, projectors[name])
    run(config)
    final = LlavaModel.from_pretrained(tmp_path / "fine" / "final")
    base = AutoModelForCausalLM.from_pretrained(model.language_model).state_dict()
    changed = final.language_model.state_dict()
    assert all(not torch.equal(base[name], changed[name]) for name in base if "weight" in name)
    files = [path.name for path in (tmp_path / "fine").rglob("*") if path.is_file()]
    assert not any("clip" in name or "sd" in name for name in files)


def test_finetune_with_lora_leaves_the_base_alone(project, tmp_path) -> None:
    folder, model = project
    config = FinetuneConfig(
        out=tmp_path / "fine",
        data=data_options(folder),
        model=model,
        stage=Finetune(**SMALL, learning_rate=1e-3),  # type: ignore[arg-type]
        lora=LoraOptions(rank=2),
    )
    run(config)
    assert (tmp_path / "fine" / "final" / "adapter").is_dir()
    assert not (tmp_path / "fine" / "final" / "language_model").exists()
    final = LlavaModel.from_pretrained(tmp_path / "fine" / "final")
    base = AutoModelForCausalLM.from_pretrained(model.language_model).state_dict()
    inside = {
        name.replace(".base_layer.", "."): value
        for name, value in final.language_model.get_base_model().state_dict().items()
    }
    assert all(torch.equal(base[name], inside[name]) for name in base)
    lora = [value for name, value in final.language_model.named_parameters() if "lora_B" in name]
    assert lora and all(value.abs().max() > 0 for value in lora)


@pytest.mark.parametrize(("processes", "done"), [(1, 1), (1, 5), (2, 1), (2, 5), (2, 7)])
def test_every_process_takes_the_order_of_the_epoch_it_resumes_in(
    processes: int, done: int
) -> None:
    """What accelerate makes of the data loader may call no ``set_epoch``, or that of another epoch."""
    from accelerate import skip_first_batches
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader

    wanted = StepSampler([1] * 16, 4, 0)
    wanted.epoch = done // 4
    sampler = StepSampler([1] * 16, 4, 0)
    EpochCallback(sampler).on_epoch_begin(None, SimpleNamespace(global_step=done), None)
    found = []
    for rank in range(processes):
        loader = DataLoader(range(16), batch_size=4 // processes, sampler=sampler)  # type: ignore[arg-type]
        mine = prepare_data_loader(
            loader, torch.device("cpu"), processes, rank, put_on_device=False
        )
        mine.set_epoch(7)
        mine = skip_first_batches(mine, done % 4)
        mine.set_epoch(0)
        found.append([batch.tolist() for batch in mine])
    together = [index for step in zip(*found, strict=True) for some in step for index in some]
    assert together == list(wanted)[4 * (done % 4) :]


@pytest.mark.parametrize("language_model", [tiny_llama, tiny_mpt])
def test_lora_trains_on_every_language_model_keyed_by_the_seed(
    project, tmp_path, language_model
) -> None:
    folder, model = project
    model = replace(model, language_model=str(language_model(tmp_path / "lm")), template="mpt")
    found = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)  # no global state enters
        config = FinetuneConfig(
            out=tmp_path / f"fine{number}",
            data=data_options(folder),
            model=model,
            stage=Finetune(**SMALL, seed=seed, learning_rate=1e-3, warmup=0.0),  # type: ignore[arg-type]
            lora=LoraOptions(rank=2),
            limit=4,
        )
        run(config)
        file = config.out / "final" / "adapter" / "adapter_model.safetensors"
        found.append(load_file(file))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not all(torch.equal(value, found[2][name]) for name, value in found[0].items())
    assert all(value.abs().max() > 0 for name, value in found[0].items() if "lora_B" in name)
    adapter = read_json(tmp_path / "fine0" / "final" / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (2, 4)  # twice the rank
    final = LlavaModel.from_pretrained(tmp_path / "fine0" / "final")
    loaded = {name: value for name, value in final.state_dict().items() if "lora_" in name}
    assert len(loaded) == len(found[0])


def test_without_deepspeed_weights_are_float32_and_saved_in_their_own_format(
    project, tmp_path
) -> None:
    """At 2e-5 a step is smaller than bfloat16's spacing: nearly nothing would change."""
    folder, model = project
    model = replace(model, dtype="bfloat16")
    stage = Finetune(**SMALL, precision="bfloat16", epochs=2.0)  # type: ignore[arg-type]
    config = FinetuneConfig(
        out=tmp_path / "fine", data=data_options(folder), model=model, stage=stage
    )
    before = open_job(config, "finetune").model.state_dict()
    run(config)
    trained = load_file(tmp_path / "fine" / "checkpoints" / "checkpoint-8" / "trained.safetensors")
    assert all(value.dtype == torch.float32 for value in trained.values())
    changed = sum(int((before[name].float() != value).sum()) for name, value in trained.items())
    assert changed > 0.9 * sum(value.numel() for value in trained.values())
    final = LlavaModel.from_pretrained(tmp_path / "fine" / "final")
    assert all(value.dtype == torch.bfloat16 for value in final.state_dict().values())


def test_several_gpus_without_a_launcher_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match=r"4 GPUs but one process.*torchrun --nproc-per-node 4"):
        training_arguments(Pretrain(zero=0), tmp_path)


def test_cut_of_a_batch_does_not_change_the_loss(project, tmp_path) -> None:
    one = pretrain(project, tmp_path / "one", stage={"batch_size": 4})
    other = pretrain(project, tmp_path / "other", stage={"batch_size": 1})
    run(one)
    run(other)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "other"), rel=1e-4)


def test_the_validation_loss_is_the_mean_over_its_batches(project, tmp_path) -> None:
    """At each checkpoint and in the report; at a learning rate near 0 that of the model as it began."""
    held_out = write_data(tmp_path / "held_out.json", [record(number) for number in range(4)])
    config = pretrain(project, tmp_path / "run", stage={"learning_rate": 1e-12})
    run(replace(config, validation_data=held_out))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, lines) if "validation_loss" in line]
    assert [line["step"] for line in found] == [2, 4]
    job = open_job(replace(config, validation_data=held_out, out=tmp_path / "other"), "pretrain")
    assert job.validation is not None and len(job.validation) == 4 and len(job.dataset) == 16
    own = []
    for some in ((0, 1), (2, 3)):
        batch = job.collator([job.validation[number] for number in some])
        pairs = zip(job.towers, batch["pixels"], strict=True)
        grids = [tower.grids(pixels, batch["image_ids"]) for tower, pixels in pairs]
        names = ("input_ids", "attention_mask", "labels")
        with torch.no_grad():
            own.append(job.model(**{name: batch[name] for name in names}, grids=grids).loss.item())
    wanted = pytest.approx(sum(own) / 2, rel=1e-5)
    assert found[0]["validation_loss"] == wanted
    assert read_json(tmp_path / "run" / "report.json")["validation_loss"] == wanted


def test_projectors_may_have_a_rate_of_their_own(project, tmp_path) -> None:
    """With one near 0 nothing but the language model changes; attention and trackers are passed on."""
    folder, model = project
    stage = Finetune(**SMALL, projector_rate=1e-12, attention="eager", learning_rate=1e-3)  # type: ignore[arg-type]
    config = FinetuneConfig(
        out=tmp_path / "fine", data=data_options(folder), model=model, stage=stage
    )
    before = open_job(config, "finetune").model.state_dict()
    run(config)
    final = LlavaModel.from_pretrained(tmp_path / "fine" / "final")
    for name, value in final.state_dict().items():
        apart = (value - before[name]).abs().max()
        assert apart < 1e-9 if name.startswith("projectors.") else apart > 1e-4, name
    job = open_job(config, "finetune")
    arguments = training_arguments(replace(stage, track=("tensorboard",)), config.out)
    assert arguments.report_to == ["tensorboard"]
    build_trainer(
        job.model, job.dataset, job.collator, stage, training_arguments(stage, config.out)
    )
    assert job.model.language_model.config._attn_implementation == "eager"
    unknown = replace(stage, track=("carrier_pigeon",))
    with pytest.raises(ValueError, match="carrier_pigeon"):
        arguments = training_arguments(unknown, config.out)
        build_trainer(job.model, job.dataset, job.collator, unknown, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": 200}, "tower 1's `timestep` 25, not 200"),
        ({"seed": 3}, "tower 1's `seed` 0, not 3"),
    ],
)
def test_projectors_of_other_towers_are_refused(project, tmp_path, changes, message) -> None:
    folder, model = project
    run(pretrain(project, tmp_path / "pre"))
    other = replace(model, towers=(model.towers[0], replace(model.towers[1], **changes)))
    config = FinetuneConfig(
        pretrained=tmp_path / "pre", out=tmp_path / "fine", data=data_options(folder), model=other
    )
    config = replace(config, stage=Finetune(**SMALL))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        run(config)


def test_learning_rate_follows_warmup_and_cosine(project, tmp_path) -> None:
    import math

    run(pretrain(project, tmp_path / "pre", stage={"warmup": 0.25, "epochs": 2.0}))
    lines = (tmp_path / "pre" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    total, warm = 8, 2
    wanted = [
        step / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
        for step in range(total)
    ]
    assert rates == pytest.approx([2e-3 * factor for factor in wanted])


def test_gathered_weights_are_given_back_in_training(project, tmp_path, monkeypatch) -> None:
    """Under ZeRO-3 alone, from the first step until the model is gathered."""
    inside, during = [False], []
    steps, gathered = LlavaTrainer.training_step, stage_run.whole_state

    @contextmanager
    def freed():
        inside[0] = True
        yield
        inside[0] = False

    def noted(function):
        return lambda *given, **named: (during.append(inside[0]), function(*given, **named))[1]

    monkeypatch.setattr(LlavaTrainer, "training_step", noted(steps))
    monkeypatch.setattr(stage_run, "whole_state", noted(gathered))
    monkeypatch.setattr(stage_run, "freed_memory_returned", freed)
    for shared in (True, False):
        monkeypatch.setattr(stage_run, "is_partitioned", lambda _, shared=shared: shared)
        during.clear()
        run(pretrain(project, tmp_path / f"{shared}", stage={"epochs": 0.25}))
        assert set(during) == {shared} and len(during) > 1 and not inside[0]
