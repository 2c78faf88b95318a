"""``save_pretrained`` as a library user calls it: modes by the umask, files whole or as they were."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from files_helpers import contents
from sae_helpers import random_model

from llava_ext.checkpoint import load_model
from llava_ext.language import find_language_model
from revelio.backbones.registry import find_source
from revelio.diffc.model import DiffC, load_diffc
from revelio.hub import is_hub_id
from revelio.pipelines.inputs import open_sae
from revelio.sae.model import KSparseAutoencoder


def diffc() -> DiffC:
    return DiffC(3, 2, width=2, class_names=["a", "b"], seed=0).eval()


MODELS: dict[str, Callable[[], Any]] = {"k-sae": lambda: random_model(d=6), "diffc": diffc}
LOADED: dict[str, Callable[[Path], Any]] = {
    "k-sae": KSparseAutoencoder.from_pretrained,
    "diffc": load_diffc,
}


@pytest.fixture(params=[0o022, 0o002, 0o077])
def mode(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


@pytest.mark.parametrize("name", MODELS)
def test_the_umask_decides_who_reads_a_saved_model(tmp_path: Path, name: str, mode: int) -> None:
    MODELS[name]().save_pretrained(tmp_path / "new" / "model")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"config.json", "model.safetensors", "README.md"}
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_whole_or_as_it_was(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    model = MODELS[name]()
    model.save_pretrained(str(folder))
    (folder / "README.md").write_text("my own card")
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)

    def stop(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
    assert contents(folder) == before
    model.save_pretrained(folder)
    assert contents(folder) == before
    again = LOADED[name](folder).state_dict()
    assert all(bool((value == again[key]).all()) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_push_goes_to_the_repository_called_like_the_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def push(self: Any, *, repo_id: str, **named: Any) -> str:
        asked.append(repo_id)
        return f"https://hub/{repo_id}"

    model = MODELS[name]()
    monkeypatch.setattr(type(model), "push_to_hub", push)
    assert model.save_pretrained(tmp_path / "my-model", push_to_hub=True) == "https://hub/my-model"
    model.save_pretrained(tmp_path / "my-model", push_to_hub=True, repo_id="me/other")
    assert asked == ["my-model", "me/other"]
    assert model.save_pretrained(tmp_path / "my-model") is None


@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_the_way_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file is a file, not a folder"):
        MODELS[name]().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("name", MODELS)
def test_a_card_has_the_models_numbers_and_no_license(tmp_path: Path, name: str) -> None:
    measured = {"top-1": 0.98765, "unknown": None, "wilson95": [0.8432915302, 1.0], "none": ()}
    found = {"measured": measured, "class|name": "<b>\x1b[31m"}
    MODELS[name]().save_pretrained(tmp_path / "model", model_card_kwargs=found)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license" not in card and "More Information" not in card and "{{" not in card
    table = [line.strip("| ") for line in card.splitlines() if line.startswith("| ")]
    rows = dict(line.rsplit(" | ", 1) for line in table if " | " in line)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in ("d", "n", "k") if name == "k-sae" else ("channels", "classes", "width"):
        assert rows[key] == str(config[key])
    assert rows["measured: top-1"] == "0.9877" and "unknown" not in card
    assert rows["measured: wilson95"] == "0.8433, 1" and "measured: none" not in rows
    assert "class\\|name" in card and "\x1b" not in card and "<b>" not in card


@pytest.mark.parametrize("name", ["runs/x", "runs/x/final", "gone/x/final", "./x", "/gone/x"])
@pytest.mark.parametrize(
    "read",
    [
        KSparseAutoencoder.from_pretrained,
        open_sae,
        load_diffc,
        find_source,
        find_language_model,
        load_model,
    ],
)
def test_a_path_that_is_missing_is_not_asked_for_on_the_hub(
    read: Callable[[str], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for function in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{function}", asked)
    with pytest.raises(ValueError, match=name):
        read(name)
    assert is_hub_id("owner/name")
