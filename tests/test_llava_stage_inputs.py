"""A resumed run notices whatever has changed of what it reads; a moved run goes on."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llava_train_helpers import (
    SMALL,
    data_options,
    losses,
    pretrain,
    record,
    tiny_project,
    write_data,
)
from safetensors.torch import load_file, save_file

from llava_ext import stage_inputs as stage_inputs_module
from llava_ext.config import CacheConfig, FinetuneConfig, ModelConfig, TrainConfig
from llava_ext.run import open_job, run
from llava_ext.stage_inputs import Inputs, language_identity, record_inputs, stage_inputs
from llava_ext.stages import Finetune
from llava_ext.tower_cache_job import fill, open_cache_job
from revelio.data.contents import WINDOW, WINDOWS
from revelio.distributed import Processes
from revelio.run_dir import Run, read_json, write_json

SIZE = 8192  # of a picture's file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """A project whose pictures' files have one size, with a finished stage 1 and a cache."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_project(folder, records=6)
    shutil.copyfile(folder / "images" / "0.png", folder / "images" / "7.png")
    for file in (folder / "images").iterdir():
        file.write_bytes(file.read_bytes().ljust(SIZE, b"\0"))
    write_data(folder / "held_out.json", [record(7)])
    write_json(folder / "zero.json", {"zero_optimization": {"stage": 2}})
    towers = tuple(replace(each, backbone=Path(each.backbone).name) for each in model.towers)
    model = replace(model, language_model="lm", towers=towers)
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        fill_cache(Path(), model)
        run(pretrain((Path(), model), Path("pre")))
    return folder, model


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> tuple[Path, ModelConfig]:
    """A copy to be changed, from inside which all names are given."""
    folder, model = made
    shutil.copytree(folder, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return Path(), model


def fill_cache(folder: Path, model: ModelConfig) -> None:
    config = CacheConfig(cache=folder / "cache", data=data_options(folder), model=model)
    for _ in fill(open_cache_job(config, Processes())):
        pass


def edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(read_json(path) | entries))


def edit_weights(path: Path) -> None:
    weights = {name: weight + 1 for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def refill_cache(model: ModelConfig) -> None:
    """From another picture of the same name; what it says of the towers is the same."""
    shutil.rmtree("cache")
    shutil.copyfile("images/1.png", "images/0.png")
    fill_cache(Path(), model)


def rewrite(path: str, old: str, new: str) -> None:
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


# What is changed -> what a run that reads it says has changed.
CHANGES: dict[str, tuple[Callable[[ModelConfig], Any], dict[str, set[str]]]] = {
    "records": (
        lambda _: write_data(Path("data.json"), [record(n, id="x") for n in range(6)]),
        {"data": {"sha256"}},
    ),
    "fewer records": (
        lambda _: write_data(Path("data.json"), [record(n) for n in range(5)]),
        {"data": {"sha256", "samples"}, "pictures": {"names and sizes", "contents"}},
    ),
    "a picture": (
        lambda _: shutil.copyfile("images/1.png", "images/0.png"),
        {"pictures": {"contents"}},
    ),
    "held-out records": (
        lambda _: write_data(Path("held_out.json"), [record(7, id="x")]),
        {"validation data": {"sha256"}},
    ),
    "the language model's weights": (
        lambda _: edit_weights(Path("lm/model.safetensors")),
        {"language model": {"weights", "whole weights"}},
    ),
    "a held-out picture": (
        lambda _: shutil.copyfile("images/1.png", "images/7.png"),
        {"validation pictures": {"contents"}},
    ),
    "the held-out pictures": (
        lambda _: write_data(Path("held_out.json"), [record(1)]),
        {"validation data": {"sha256"}, "validation pictures": {"names and sizes", "contents"}},
    ),
    "the language model's config": (
        lambda _: edit_json(Path("lm/config.json"), rms_norm_eps=0.1),
        {"language model": {"config"}},
    ),
    "the tokenizer": (
        lambda _: edit_json(Path("lm/tokenizer_config.json"), model_max_length=77),
        {"language model": {"tokenizer"}},
    ),
    "the chat template": (
        lambda _: rewrite("lm/chat_template.jinja", "<|im_end|>\n", "<|im_end|>"),
        {"language model": {"chat template"}},
    ),
    "a tower": (
        lambda _: edit_weights(Path("clip/model.safetensors")),
        {"tower 0": {"weights"}},
    ),
    "the projectors": (
        lambda _: edit_weights(Path("pre/final/projectors.safetensors")),
        {"pretrained": {"projectors"}},
    ),
    "the DeepSpeed JSON": (
        lambda _: edit_json(Path("zero.json"), steps_per_print=3),
        {"DeepSpeed": {"config"}},
    ),
    "its stage": (
        lambda _: edit_json(Path("zero.json"), zero_optimization={"stage": 3}),
        {"DeepSpeed": {"ZeRO stage", "config"}},
    ),
    "the cache": (refill_cache, {"tower 0": {"cache"}, "tower 1": {"cache"}}),
}


def finetuning(project: tuple[Path, ModelConfig]) -> FinetuneConfig:
    folder, model = project
    return FinetuneConfig(
        data=data_options(folder), model=model, pretrained=Path("pre"), stage=Finetune(**SMALL),  # type: ignore[arg-type]
        validation_data=Path("held_out.json"), out=Path("run"),
    )  # fmt: skip


def cached(config: FinetuneConfig) -> FinetuneConfig:
    """The cache holds no held-out picture."""
    return replace(config, cache=Path("cache"), validation_data=None)


def inputs_of(config: TrainConfig, **deepspeed: Any) -> Inputs:
    job = open_job(config, "finetune")
    Path("run").mkdir(exist_ok=True)
    config = replace(config, stage=replace(config.stage, **deepspeed))
    held_out = job.validation.records if job.validation else ()
    read = (job.dataset, job.records, job.towers, job.tokenizer, Path("run"), held_out)
    return stage_inputs(config, *read)


def differing(before: Inputs, after: Inputs) -> dict[str, set[str]]:
    assert {name: set(value) for name, value in before.items()} == {
        name: set(value) for name, value in after.items()
    }
    keys = {name: {k for k in was if was[k] != after[name][k]} for name, was in before.items()}
    return {name: some for name, some in keys.items() if some}


@pytest.mark.parametrize("change", CHANGES)
def test_every_input_is_told_from_another(project, change: str) -> None:
    edit, wanted = CHANGES[change]
    config = finetuning(project)
    config = cached(config) if change == "the cache" else config
    own = {"zero": 2, "deepspeed": Path("zero.json")}
    before = inputs_of(config, **own)
    assert differing(before, inputs_of(config, **own)) == {}
    edit(project[1])
    assert differing(before, inputs_of(config, **own)) == wanted
    run_dir = Run.open(Path("noted"), "finetune", "")
    record_inputs(run_dir, before, accept=False)
    after = inputs_of(config, **own)
    said = "another ZeRO stage" if change == "its stage" else f"changed since: {next(iter(wanted))}"
    with pytest.raises(ValueError, match=said):
        record_inputs(run_dir, after, accept=False)
    if change == "its stage":
        with pytest.raises(ValueError, match=said):  # its checkpoints can't be read
            record_inputs(run_dir, after, accept=True)
    else:
        told = record_inputs(run_dir, after, accept=True)
        assert all(name in told for name in wanted)
        assert read_json(Path("noted/manifest.json"))["inputs"] == after


def test_each_thing_noted_has_its_change(project) -> None:
    own = {"zero": 2, "deepspeed": Path("zero.json")}
    config = finetuning(project)
    both = [inputs_of(one, **own) for one in (config, cached(config))]
    noted = {(name, key) for inputs in both for name, value in inputs.items() for key in value}
    tested = {(name, key) for _, told in CHANGES.values() for name in told for key in told[name]}
    assert noted - tested == {("tower 1", "weights")}


def test_a_changed_weight_anywhere_is_seen_and_files_are_read_once(tmp_path, monkeypatch) -> None:
    """A digest has but windows of a large file; times of change say which were read before."""
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text('{"model_type": "llama"}')
    for number in range(2):
        file = tmp_path / "lm" / f"model-{number}.safetensors"
        file.write_bytes(bytes([number]) * (WINDOW * (WINDOWS + 4)))
    read: list[str] = []
    own = stage_inputs_module.sha256
    monkeypatch.setattr(
        stage_inputs_module, "sha256", lambda file: read.append(file.name) or own(file)
    )
    before = language_identity(str(tmp_path / "lm"), keep=tmp_path)
    assert language_identity(str(tmp_path / "lm"), keep=tmp_path) == before
    assert sorted(set(read) - {"config.json"}) == [f"model-{n}.safetensors" for n in range(2)]
    assert len(read) == 4  # the config twice
    with file.open("r+b") as out:  # between two windows of the digest
        out.seek(WINDOW + 10)
        out.write(b"x")
    os.utime(file, (1, 1))
    after = language_identity(str(tmp_path / "lm"), keep=tmp_path)
    assert after["weights"] == before["weights"]
    assert after["whole weights"] != before["whole weights"]
    assert read[4:] == ["model-1.safetensors", "config.json"]
    (tmp_path / "weights.json").write_text("{")
    assert language_identity(str(tmp_path / "lm"), keep=tmp_path) == after


def test_a_run_says_what_has_changed_and_an_older_ones_manifest_is_enough(project) -> None:
    config = pretrain(project, Path("run"))
    run(config)
    Path("run/report.json").unlink()  # as a kill at the end leaves it
    again = replace(config, resume=True)
    edit_json(Path("lm/config.json"), rms_norm_eps=0.1)
    rewrite("lm/chat_template.jinja", "<|im_end|>\n", "<|im_end|>")
    said = r"changed since: language model \(config, chat template\): put back what was there, or"
    with pytest.raises(ValueError, match=said):
        run(again)
    manifest = read_json(Path("run/manifest.json"))
    language = manifest["inputs"]["language model"]
    manifest["inputs"]["language model"] = {"weights": language["weights"]}
    del manifest["inputs"]["tower 1"]
    write_json(Path("run/manifest.json"), manifest)
    run(again)
    assert set(read_json(Path("run/manifest.json"))["inputs"]["language model"]) == set(language)


def test_a_moved_run_goes_on(project) -> None:
    config = pretrain(project, Path("run"), stage={"epochs": 2.0})
    run(config)
    expected = losses(Path("run"))
    Path("run/report.json").unlink()
    shutil.rmtree("run/checkpoints/checkpoint-4", ignore_errors=True)
    Path("elsewhere").mkdir()
    shutil.move("run", "elsewhere/moved")
    run(replace(config, out=Path("elsewhere/moved"), resume=True))
    assert losses(Path("elsewhere/moved")) == expected and not Path("run").exists()
    with pytest.raises(ValueError, match=r"was started with `stage\.seed: 0`"):
        stage = replace(config.stage, seed=1)
        moved = replace(config, out=Path("elsewhere/moved"), resume=True, stage=stage)
        run(moved)
