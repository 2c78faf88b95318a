"""A file that came with weights never imports code; a user who names the code does."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from diffc_helpers import write_folders
from llava_helpers import model_config, picture, tiny_llama, tower_configs

from llava_ext.checkpoint import save_model
from llava_ext.config import ConversationData, TokensConfig
from llava_ext.generate import Assistant
from llava_ext.language import build_model, load_language_model, load_tokenizer
from llava_ext.tokens import open_token_job
from llava_ext.towers import load_towers
from revelio.backbones.registry import load_backbone
from revelio.cli import main
from revelio.diffc.config import GridsConfig
from revelio.diffc.inputs import open_backbone
from revelio.diffc.model import DiffC, load_diffc

# Importing it leaves a file, and its function makes a backbone that diffc_helpers describes.
CODE = """
from pathlib import Path
from pickle import UnpicklingError
Path("ran.txt").touch()
def load(**settings):
    from diffc_helpers import FormulaBackbone
    return FormulaBackbone()
"""
TURNS = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a cat"}]
RECORD = {"image": "cat.png", "conversations": TURNS}
NAMES = ("foreign_code:load", "foreign_code:", "foreign_code:load:more", "os:system")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working folder with a module that tells when it was imported."""
    (tmp_path / "foreign_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("foreign_code", None)


def saved_diffc(folder: Path, backbone: str) -> Path:
    made = {"backbone": backbone, "layer": "mix", "timestep": 3, "prompts": "empty", "seed": 0}
    DiffC(3, 3, width=4, class_names=["blue", "green", "red"], grids=made).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_diffc_never_imports(workplace, name):
    model = load_diffc(saved_diffc(workplace / "model", name))
    with pytest.raises(ValueError, match=r"would import and run the module '(foreign_code|os)'"):
        open_backbone(GridsConfig.of(model.grids, "cpu"))
    assert not (workplace / "ran.txt").exists()


def test_eval_diffc_imports_only_what_the_user_names(workplace, capsys):
    folder = saved_diffc(workplace / "model", "foreign_code:load")
    pictures = write_folders(workplace / "pictures", 1)
    words = ["eval-diffc", "--diffc", str(folder), "--data.source", str(pictures)]
    words += ["--data.split", "None", "--device", "cpu", "--workers", "0"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert "'foreign_code:load'" in said and "`backbone` says where it lies" in said
    assert not (workplace / "ran.txt").exists()
    main([*words, "--backbone", "foreign_code:load"])
    assert (workplace / "ran.txt").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_llava_model_never_imports(workplace, name):
    towers = tower_configs(workplace / "towers")
    config = model_config(tiny_llama(workplace / "llama"), towers["clip"])
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    model.settings = replace(config, towers=(replace(towers["clip"], backbone=name),))
    save_model(model, tokenizer, workplace / "saved")
    with pytest.raises(ValueError, match=r"would import and run the module .* as `allow` for"):
        Assistant.load(workplace / "saved", device="cpu")
    with pytest.raises(ValueError, match=r"would import and run the module .* as `allow` for"):
        Assistant.load(workplace / "saved", device="cpu", allow=["another:load"])
    (workplace / "d.json").write_text(json.dumps([RECORD]))
    picture(1).save(workplace / "cat.png")
    tokens = TokensConfig(
        model=str(workplace / "saved"), data=ConversationData(workplace / "d.json", workplace),
        layer="block1", out=workplace / "tokens", device="cpu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="would import and run the module"):
        open_token_job(tokens)
    assert not (workplace / "ran.txt").exists()
    if name == NAMES[0]:
        for load in (
            lambda: Assistant.load(workplace / "saved", device="cpu", allow=[name]),
            lambda: open_token_job(replace(tokens, allow=(name,))),
        ):
            with pytest.raises(KeyError):  # imported as allowed; it has no layer of that name
                load()
            assert (workplace / "ran.txt").exists()
            (workplace / "ran.txt").unlink()
            sys.modules.pop("foreign_code")


@pytest.mark.parametrize("load", [load_language_model, load_tokenizer])
def test_remote_code_of_a_language_model_is_refused(workplace, monkeypatch, load):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    folder = tiny_llama(workplace / "llama")
    code = {"AutoConfig": "foreign_code.C", "AutoModelForCausalLM": "foreign_code.M"}
    code["AutoTokenizer"] = ["foreign_code.T", None]
    for name in ("config.json", "tokenizer_config.json"):
        entries = json.loads((folder / name).read_text()) | {"auto_map": code}
        entries |= {"model_type": "strange"} if name == "config.json" else {}
        entries.pop("tokenizer_class", None)
        (folder / name).write_text(json.dumps(entries))
    (folder / "foreign_code.py").write_text(f"open({str(workplace / 'ran.txt')!r}, 'w')")
    with pytest.raises(ValueError, match=r"can't be loaded|can be loaded"):
        load(str(folder))
    assert not (workplace / "ran.txt").exists()


def test_the_users_own_name_still_imports(workplace):
    grids = load_backbone("foreign_code:load").encode(torch.zeros(1, 3, 16, 16))
    assert (workplace / "ran.txt").exists() and grids.shape == (1, 3, 16, 16)


def test_a_checkpoint_of_zero_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed unpickles whatever its files hold; here only plain values and three classes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    from llava_ext import deepspeed

    class Touch:
        def __reduce__(self) -> tuple[object, ...]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w').close()",))

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    deepspeed.prepare(cpu=True)
    torch.save({"a": torch.ones(2), "b": Touch()}, tmp_path / "evil.pt")
    with pytest.raises(UnpicklingError):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.ones(2), "b": LossScaler(2.0)}, tmp_path / "own.pt")
    assert torch.load(tmp_path / "own.pt", weights_only=False)["b"].cur_scale == 2
