"""A stage that is stopped anywhere goes on to the same bytes; what changed or was damaged is one line."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from files_helpers import bury, bury_partials, contents, killed_at, results
from llava_train_helpers import losses, pretrain, tiny_project, write_data
from safetensors.torch import load_file, save_file

from llava_ext import fitting
from llava_ext.config import ModelConfig, PretrainConfig
from llava_ext.model import LlavaModel
from llava_ext.run import run
from llava_ext.stage_checkpoints import (
    FILES,
    STATE,
    TRAINED,
    begin,
    check_processes,
    checkpoint_step,
    commit,
    drop_checkpoints,
    last_checkpoint,
    readable,
)
from llava_ext.training import LlavaTrainer
from revelio.run_dir import read_json, sha256, write_json

SHORT = {"save_steps": 1, "epochs": 0.75}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    folder = tmp_path_factory.mktemp("llava")
    return folder, tiny_project(folder)


def test_a_resume_on_another_number_of_processes_is_one_line(tmp_path) -> None:
    inside = tmp_path / "checkpoint-2" / "global_step2"
    inside.mkdir(parents=True)
    for rank in range(2):
        (inside / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match="written by 2 processes under ZeRO, and there are 1 now"):
        check_processes(tmp_path / "checkpoint-2")


def test_resume_equals_uninterrupted(project, tmp_path, monkeypatch, capsys) -> None:
    twice = {"epochs": 2.0}
    whole = pretrain(project, tmp_path / "whole", stage=twice)
    cut = pretrain(project, tmp_path / "cut", stage=twice)
    run(whole)
    step = LlavaTrainer.training_step
    calls = []

    def stop(self, *arguments, **settings):
        calls.append(1)
        if len(calls) > 6:  # in the middle of a fourth step, after a checkpoint
            raise KeyboardInterrupt
        return step(self, *arguments, **settings)

    monkeypatch.setattr(LlavaTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    assert len(losses(tmp_path / "cut")) == 3 and not (tmp_path / "cut" / "final").exists()
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(replace(cut, resume=True))
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # now in the second epoch
        run(replace(cut, resume=True))
    assert 5 <= len(losses(tmp_path / "cut")) < 8
    monkeypatch.setattr(LlavaTrainer, "training_step", step)
    with pytest.raises(ValueError, match="continue it with resume"):
        run(cut)
    capsys.readouterr()
    checkpoint = last_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    last = checkpoint_step(checkpoint)
    run(replace(cut, resume=True))
    # What is left is planned: a sample's time, which is printed, times four samples a step.
    (done, about, each) = re.findall(
        r"8 steps \((\d) of them done\).*; about (?:under )?(\S+) s at (\S+) s a sample",
        capsys.readouterr().out,
    )[0]
    left = (8 - last) * 4 * float(each)
    assert int(done) == last and float(about) == pytest.approx(left, rel=0.15, abs=0.1)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = (
        load_file(tmp_path / name / "final" / "projectors.safetensors") for name in ("cut", "whole")
    )
    assert all(torch.equal(one[name], other[name]) for name in other)
    run(replace(cut, resume=True))  # finished: nothing more happens
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_changed_inputs_are_one_line_or_accepted(project, tmp_path) -> None:
    folder, _ = project
    out = tmp_path / "run"
    records = json.loads((folder / "data.json").read_text())
    data = write_data(tmp_path / "data.json", records)
    config = pretrain(project, out)
    config = replace(config, data=replace(config.data, json=data))
    run(config)
    (out / "report.json").unlink()  # as a kill at the end leaves it
    manifest = read_json(out / "manifest.json")
    assert set(manifest["inputs"]) == {"data", "language model", "pictures", "tower 0", "tower 1"}
    write_data(data, records[1:])
    again = replace(config, resume=True)
    with pytest.raises(ValueError, match=r"changed since: data \(sha256, samples\), pictures"):
        run(again)
    run(replace(again, changed_inputs="accept"))
    assert read_json(out / "manifest.json")["inputs"]["data"]["samples"] == len(records) - 1


def test_every_kill_of_a_stage_is_resumed_to_the_same(project, tmp_path, monkeypatch) -> None:
    """Checkpoints at each of three steps, one kept; killed before one in so many file operations."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    run(pretrain(project, tmp_path / "whole", stage=SHORT))
    expected = comparable(tmp_path / "whole")
    assert {Path(name).parts[1] for name in expected if "checkpoint-" in name} == {"checkpoint-3"}
    first, step = map(int, os.environ.get("REVELIO_KILLS", "13 41").split())  # "1 1": all of them
    for number in range(first, 1000, step):
        out = tmp_path / str(number)
        config = pretrain(project, out, stage=SHORT)
        killed = killed_at(number, lambda config=config: run(config), monkeypatch)
        bury(out / ".lock")
        bury_partials(out)
        run(replace(config, resume=True))
        assert comparable(out) == expected, number
        if not killed:
            break
    assert number > 60


def comparable(out: Path) -> dict[str, object]:
    """A run without times, and without bytes that torch.save gives another order or name."""
    found = results(out)
    for name in [one for one in found if one.endswith((".pt", ".pth", ".bin"))]:
        found[name] = None
    for name in [
        one for one in found if one.endswith((STATE, FILES, "report.json", "manifest.json"))
    ]:
        found[name] = None
    return found


@pytest.fixture(scope="module")
def stopped(project, tmp_path_factory) -> Path:
    """A run with two checkpoints that was stopped at the end of the third step."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    run(pretrain(project, out, stage=SHORT | {"keep": 2}))
    (out / "report.json").unlink()
    return out


@pytest.fixture
def again(project, stopped, tmp_path) -> PretrainConfig:
    """The run once more, in a folder of its own."""
    shutil.copytree(stopped, tmp_path / "run")
    config = pretrain(project, tmp_path / "run", stage=SHORT | {"keep": 2})
    return replace(config, resume=True)


def test_a_checkpoint_that_is_not_whole_is_passed_over(again: PretrainConfig) -> None:
    last, before = (again.out / "checkpoints" / f"checkpoint-{step}" for step in (3, 2))
    expected = comparable(again.out)
    (last / TRAINED).unlink()
    assert last_checkpoint(again.out) == before
    begin(last)  # stopped before it was noted down
    assert last_checkpoint(again.out) == before
    (last / FILES).unlink()  # the first versions wrote none: a state that was cut
    (last / STATE).write_text((last / STATE).read_text()[:40])
    assert last_checkpoint(again.out) == before
    for folder in (last, before):
        (folder / "notes.txt").write_text("mine")
    run(again)
    found = comparable(again.out)
    assert {one: found.get(one) for one in expected} == expected
    notes = {one for one in found if one.endswith("notes.txt")}
    assert notes == {f"checkpoints/checkpoint-{step}/notes.txt" for step in (2, 3)}


@pytest.mark.parametrize("name", [TRAINED, "optimizer.pt", "shape"])
def test_a_damaged_checkpoint_is_named(again: PretrainConfig, name: str) -> None:
    last = again.out / "checkpoints" / "checkpoint-3"
    if name == "shape":  # of the first versions, which noted no hashes
        (last / FILES).unlink()
        weights = load_file(last / TRAINED)
        key = max(weights, key=lambda one: weights[one].ndim)
        save_file({**weights, key: weights[key][:1].contiguous()}, last / TRAINED)
        said = f"`{key}` has shape"
    else:
        data = bytearray((last / name).read_bytes())
        data[-3] ^= 1
        (last / name).write_bytes(data)
        said = f"{name} is not what the run wrote: remove checkpoint-3"
    with pytest.raises(ValueError, match=said):
        run(again)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", STATE])
def test_a_checkpoint_of_another_making_is_one_line(again: PretrainConfig, name: str) -> None:
    """What is in it is not what the Trainer wrote, and its list of hashes says so."""
    last = again.out / "checkpoints" / "checkpoint-3"
    if name == STATE:
        write_json(last / name, read_json(last / name) | {"max_steps": "x"})
    else:
        torch.save({"param_groups": Path("x")}, last / name)
    write_json(last / FILES, read_json(last / FILES) | {name: sha256(last / name)})
    with pytest.raises(ValueError, match="checkpoint-3"):
        run(again)


def test_rotation_leaves_what_is_not_the_runs_own(tmp_path) -> None:
    place = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        inside = place / f"checkpoint-{step}" / f"global_step{step}"
        inside.mkdir(parents=True)
        (inside / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
        own = (TRAINED, "optimizer.pt", "rng_state_0.pth", "zero_to_fp32.py", "zero_to_torch.py")
        for name in own:
            (inside.parent / name).touch()
        write_json(inside.parent / STATE, {"global_step": step})
        commit(inside.parent)
    (place / "checkpoint-1" / "global_step1" / "mine.txt").touch()
    (place / "checkpoint-7").symlink_to(tmp_path)
    (place / "checkpoint-x").mkdir()
    (place / "checkpoint-x" / TRAINED).touch()
    drop_checkpoints(tmp_path, keep=1)
    left = {name for name in contents(place) if "checkpoint-3" not in name}
    assert left == {"checkpoint-1/global_step1/mine.txt", f"checkpoint-x/{TRAINED}"}
    assert not (place / "checkpoint-2").exists() and (place / "checkpoint-7").is_symlink()
    assert last_checkpoint(tmp_path) == place / "checkpoint-3"
    assert set(read_json(place / "checkpoint-3" / FILES)) == set(
        contents(place / "checkpoint-3")
    ) - {FILES}


def test_a_checkpoint_is_not_blamed_for_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is read, processes meet: the error of one whose peer has ended is no damage."""
    ended = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1")
    with pytest.raises(ValueError, match="can't be read"), readable(tmp_path):
        raise ended
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="closed by peer"), readable(tmp_path):
        raise ended


class Small:
    """A GPU that holds `fits` samples of a batch; its memory runs out after some steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fits: int, after: int) -> None:
        plain, self.calls = LlavaModel.forward, 0

        def forward(model, *given, **named):
            self.calls += model.training
            if self.calls > after and len(named["input_ids"]) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return plain(model, *given, **named)

        monkeypatch.setattr(LlavaModel, "forward", forward)


FOUR = SHORT | {"batch_size": 4}


@pytest.fixture(scope="module")
def wanted(project, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run at batches of four."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(pretrain(project, out, stage=FOUR))
    return losses(out)


@pytest.mark.parametrize("fits", [0, 1])
def test_memory_that_runs_out_names_the_batch_that_fits_and_the_run_goes_on_with_it(
    project, wanted, tmp_path, monkeypatch, fits
) -> None:
    cut = pretrain(project, tmp_path / "cut", stage=FOUR)
    with monkeypatch.context() as patch:
        # One forward pass measures the time of a step before the first.
        Small(patch, fits, after=3)
        said = rf"batch_size 4 goes beyond .*: {fits} fits; resume with stage.batch_size {fits} "
        with pytest.raises(
            ValueError, match=said if fits else "and so does a single sample: resume with"
        ):
            run(cut)
    assert len(losses(tmp_path / "cut")) == 2
    smaller = replace(cut.stage, batch_size=fits or 2, checkpointing=not fits)
    with pytest.raises(ValueError, match="was started with `stage"):
        run(replace(cut, resume=True, stage=replace(smaller, learning_rate=1e-5)))
    run(replace(cut, resume=True, stage=smaller))
    assert losses(tmp_path / "cut") == pytest.approx(wanted, rel=1e-5)


def test_a_gpu_that_cannot_hold_the_weights_is_refused_before_the_run_begins(
    project, tmp_path, monkeypatch
) -> None:
    config = pretrain(project, tmp_path / "out")
    room = 1000
    monkeypatch.setattr(fitting.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fitting.torch.cuda, "mem_get_info", lambda _: (room, room))
    model = torch.nn.Linear(10, 10, bias=False)  # 100 weights: 16 bytes each, 2 where frozen
    with pytest.raises(
        ValueError, match=r"1.0 kB free, and .* take 1.6 kB in each of 1 process .*stage.offload"
    ):
        fitting.refuse_shortage(model, config.stage)
    fitting.refuse_shortage(model, replace(config.stage, offload=True))
    fitting.refuse_shortage(model.requires_grad_(False), config.stage)
    assert not (tmp_path / "out").exists()
