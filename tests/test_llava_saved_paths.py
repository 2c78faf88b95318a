"""A saved model says nothing about the machine it was saved on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llava_train_helpers import SMALL, data_options, pretrain, tiny_project

from llava_ext import language
from llava_ext.checkpoint import load_model, save_model
from llava_ext.config import FinetuneConfig, ModelConfig
from llava_ext.export import export_model
from llava_ext.run import run
from llava_ext.stages import Finetune, LoraOptions

NAME = "tiny-packaged"


@pytest.fixture
def project(tmp_path, monkeypatch) -> tuple[Path, ModelConfig]:
    """A tower named from inside the folder, and a packaged language model, which lies in it, too."""
    model = tiny_project(tmp_path, records=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language, "PACKAGED", {NAME: None})
    monkeypatch.setattr(language, "packaged_path", lambda name: tmp_path / "lm")
    tower = replace(model.towers[0], backbone="clip", tokens="flatten", budget=16)
    return Path(), replace(model, language_model=NAME, towers=(tower,))


def check(folder: Path, here: Path) -> None:
    """No file holds this machine's paths; bytes, so that every kind of file is looked into."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 1
    for file in files:
        for place in (here, Path.home()):
            assert str(place).encode() not in file.read_bytes(), (file, place)


# peft asks the hub for the language model's vocabulary, by its name.
@pytest.mark.filterwarnings("ignore:Could not find a config file in tiny-packaged")
@pytest.mark.parametrize("rank", [None, 0, 2])
def test_no_path_of_this_machine_is_saved(project, tmp_path, rank) -> None:
    if rank is None:
        config: Any = pretrain(project, Path("run"))
    else:
        folder, model = project
        stage: Any = Finetune(**SMALL)  # type: ignore[arg-type]
        config = FinetuneConfig(
            data=data_options(folder), model=model, out=Path("run"), stage=stage,
            lora=LoraOptions(rank=rank),
        )  # fmt: skip
    run(config)
    check(Path("run/final"), tmp_path)
    model, tokenizer = load_model("run/final")
    assert model.config.text_config._name_or_path == NAME
    save_model(model, tokenizer, Path("again"), language="whole")
    check(Path("again"), tmp_path)
    for form in ("merged", "llava") if rank else ("llava",) if rank is None else ():
        export_model("run/final", Path(f"llava-{form}"), form)
        check(Path(f"llava-{form}"), tmp_path)
