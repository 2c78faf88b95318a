"""README's code runs, every config loads, and what documents name exists."""

import re
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_ext.cli.command import read_section
from llava_ext.config import FinetuneConfig, PretrainConfig
from revelio.activations.config import ExtractRunConfig
from revelio.backbones.config import BackboneConfig
from revelio.cli import COMMANDS
from revelio.config import load_config
from revelio.data.config import DataConfig
from revelio.pipelines.extract import extract_to
from tools.mini.train import read_config

ROOT = Path(__file__).parent.parent
# The folder of a config says which command takes it; under analysis/ its name begins with the command's.
COMMAND_OF = {
    "extract": "extract", "tokens": "extract-text", "ksae": "train-ksae", "diffc": "train-diffc",
}  # fmt: skip


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_readme_program_runs_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = python_blocks("README.md")
    assert blocks
    monkeypatch.chdir(tmp_path)
    said = []
    for _ in range(2):  # as a notebook's cells are run again
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {})
        said.append(capsys.readouterr().out)
    told = r"top images that share a label: (\d+)%; [\w ]+, [\w ]+, reaches (\d+)%: the k-SAE \w"
    shares = re.search(told, said[0])
    assert shares and all(10 < int(share) <= 100 for share in shares.groups())
    assert said[1] == said[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=str)
def test_every_config_loads(path: Path) -> None:
    kind = path.relative_to(ROOT / "configs").parts[0]
    if kind == "llava":
        first = read_section(path, "pretrain", PretrainConfig)
        second = read_section(path, "finetune", FinetuneConfig)
        assert second.model == first.model
        assert second.pretrained == first.out
        return
    if kind == "steering":
        kind = "ksae" if path.stem.endswith("-ksae") else "tokens"
    command = COMMAND_OF.get(kind) or next(name for name in COMMANDS if path.stem.startswith(name))
    module = import_module(f"revelio.cli.{command.replace('-', '_')}")
    given = re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE)
    # What a config leaves to the flags: places, of which some commands take several.
    places = {"out": "x", "store": "x", "ksae": "x", "top": ["x"]}
    lacking = [f.name for f in fields(module.Config) if f.default is f.default_factory is MISSING]
    load_config(module.Config, path, {key: places[key] for key in lacking if key not in given})


@pytest.mark.parametrize("path", sorted((ROOT / "tools" / "configs").rglob("*.yaml")), ids=str)
def test_every_config_of_a_shipped_model_loads(path: Path) -> None:
    assert read_config(path).name == path.stem


def test_the_backbone_of_contributing_is_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [code] = [block for block in python_blocks("CONTRIBUTING.md") if "class MyBackbone" in block]
    none = "layers=None, revision=None, image_size=None, dtype=None, attention=None, device='cpu'"
    code += f"\nTHE_ONE = load({none})\nload = lambda **_: THE_ONE\n"  # its weights are drawn anew each time
    (tmp_path / "my_models_of_docs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (70, 80), (60 * number, 0, 0)).save(tmp_path / f"pictures/{number}.png")
    config = ExtractRunConfig(
        data=DataConfig(source=str(tmp_path / "pictures")),
        backbone=BackboneConfig(name="my_models_of_docs:load", device="cpu"),
        layers=("block0", "block1"),
        timesteps=(),
        out=tmp_path / "made",
    )
    stores = extract_to(config)
    assert [store.row_shape for store in stores] == [(16,), (32,)]
    made = import_module("my_models_of_docs").THE_ONE
    pixels = torch.stack(
        [made.transform(Image.open(tmp_path / f"pictures/{number}.png")) for number in range(3)]
    )
    torch.testing.assert_close(
        stores[1].tensor(), made.network(pixels).mean((2, 3)).detach(), atol=1e-5, rtol=1e-4
    )


def test_readme_lists_every_command_and_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.sub(r"`revelio (train-diffc|top-images)`, `", r"`revelio \1` `revelio ", text)
    for command in COMMANDS:
        assert re.search(rf"revelio {command}\b|`{command}`", listed), command
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for path in re.findall(
            r"\b(?:docs|configs|revelio|benchmarks|scripts|tools)/[\w./-]+\.\w+", text
        ):
            assert (ROOT / path).exists(), f"{name} names {path}"
