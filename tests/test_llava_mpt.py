"""The paper's pairing in little: an MPT with its own template, a conv tower, both stages, then answers.

What is trained, what is masked and how an answer is asked for must fit together for a model to give back,
word for word, what it was taught about each picture: that is what is asked here.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from backbones_helpers import picture
from llava_helpers import tiny_mpt
from llava_train_helpers import (
    SCRIPTS,
    WORDS,
    data_options,
    losses,
    tiny_project,
    write_config,
)
from process_helpers import in_processes

from llava_ext.config import FinetuneConfig, ModelConfig, PretrainConfig
from llava_ext.generate import Assistant
from llava_ext.model import LlavaModel
from llava_ext.run import run
from llava_ext.stages import Finetune, Pretrain

RECORDS = 5


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """Five pictures, each with an answer of its own; CLIP and a Stable Diffusion with the conv block."""
    folder = tmp_path_factory.mktemp("mpt")
    model = tiny_project(folder, records=RECORDS)
    conv = replace(model.towers[1], tokens="conv", budget=16, width=12)
    clip = replace(model.towers[0], tokens="flatten", budget=16)
    language_model = str(tiny_mpt(folder / "mpt"))
    return folder, replace(
        model, language_model=language_model, template="mpt", towers=(clip, conv)
    )


def test_it_gives_back_what_it_was_taught(project, tmp_path) -> None:
    folder, model = project
    data = data_options(folder)
    shared = {"effective_batch": 5, "batch_size": 5, "zero": 0, "threads": 1, "save_steps": 1000}
    one = Pretrain(**shared, learning_rate=1e-2, epochs=40.0)  # type: ignore[arg-type]
    two = Finetune(**shared, learning_rate=5e-3, epochs=120.0)  # type: ignore[arg-type]
    run(PretrainConfig(out=tmp_path / "pre", data=data, model=model, stage=one))
    run(
        FinetuneConfig(
            pretrained=tmp_path / "pre", out=tmp_path / "fine", data=data, model=model, stage=two
        )
    )
    assistant = Assistant.load(tmp_path / "fine" / "final", device="cpu")
    taught = [" ".join(WORDS[: 1 + number % len(WORDS)]) for number in range(RECORDS)]
    pictures = [[picture(number)] for number in range(RECORDS)]
    question = "<image>\nwhat is it?"
    together = assistant.answer([question] * RECORDS, pictures, max_new_tokens=24)
    assert together == taught


def test_two_processes_in_bfloat16_follow_one_in_float32(project, tmp_path) -> None:
    folder, model = project
    data = data_options(folder)
    shared = {"effective_batch": 4, "batch_size": 4, "zero": 0, "epochs": 2.0, "threads": 1}
    one = tmp_path / "one"
    run(PretrainConfig(out=one / "pre", data=data, model=model, stage=Pretrain(**shared)))  # type: ignore[arg-type]
    stage = Finetune(**shared)  # type: ignore[arg-type]
    run(
        FinetuneConfig(
            pretrained=one / "pre", out=one / "fine", data=data, model=model, stage=stage
        )
    )

    two = tmp_path / "two"
    settings = {"effective_batch": 4, "batch_size": 2, "epochs": 2.0, "precision": "bfloat16"}
    config = write_config(folder, model, **settings)
    for script, name, more in (
        ("pretrain.py", "pre", ("--stage.zero", 2)),
        ("finetune.py", "fine", ("--stage.zero", 3, "--pretrained", two / "pre")),
    ):
        words = ("--config", config, "--out", two / name, *more)
        done = in_processes(2, SCRIPTS / script, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        curve, exact = losses(two / name), losses(one / name)
        # bfloat16 keeps 8 bits: each of some dozens of operations rounds by up to 0.4 %.
        assert curve == pytest.approx(exact, rel=0.05)
        assert curve != pytest.approx(exact, rel=1e-6)
    assert LlavaModel.from_pretrained(two / "fine" / "final").settings == model
