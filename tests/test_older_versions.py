"""What the first version wrote (commit 99ab243) is resumed, read, and replaced by this one.

``data/first_version.tar.xz`` holds what its commands made of six pictures: runs, stores and a cache that
were stopped in the middle, finished ones, and every kind of output folder. The tiny models are made anew:
their weights are drawn from seeds.
"""

import tarfile
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from backbones_helpers import tiny_clip, tiny_dinov2
from llava_helpers import model_config, tiny_llama

from llava_ext.config import (
    CacheConfig,
    ConversationData,
    FinetuneConfig,
    PretrainConfig,
    TowerConfig,
)
from llava_ext.run import run
from llava_ext.stages import Pretrain
from llava_ext.tower_cache import CachedGrids
from llava_ext.tower_cache_job import fill, open_cache_job
from llava_ext.towers import load_towers
from revelio.activations.store import ActivationStore
from revelio.cli import demo, main, train_diffc, train_ksae
from revelio.config import completed, to_plain, to_yaml
from revelio.distributed import Processes
from revelio.run_dir import Run, read_json

ARCHIVE = Path(__file__).parent / "data" / "first_version.tar.xz"
EXTRACT = [
    "extract",
    "--backbone.name",
    "dino",
    "--backbone.device",
    "cpu",
    "--data.source",
    "pictures",
]
EXTRACT += ["--layers", "block1", "--timesteps", "--batch-size", "2", "--shard-rows", "2"]
KSAE = ["train-ksae", "--store", "rows", "--kernel", "torch", "--steps", "4", "--k", "2"]
KSAE += ["--expansion", "2", "--batch-size", "10", "--checkpoint-every", "1", "--log-every", "1"]
DIFFC = ["train-diffc", "--store", "grids-train", "--test-store", "grids-test"]
DIFFC += ["--epochs", "3", "--width", "2", "--batch-size", "9"]
OUTPUTS = {
    "top": ["top-images", "--store", "extract/block1", "--ksae", "sae16", "--out", "top"],
    "purity.json": ["purity", "--top", "top", "--m", "3", "--out", "purity.json", "--latents", "5"],
    "eval": ["eval-diffc", "--diffc", "diffc/final", "--store", "grids-test", "--out", "eval"],
    "maps": ["pca-maps", *EXTRACT[1:10], "--out", "maps", "--data.limit", "4", "--side", "16"],
    "gallery": [
        "gallery", "--store", "extract/block1", "--ksae", "sae16", "--top", "top", "--out", "gallery",
        "--data.source", "pictures", "--latents", "4", "--thumbnail", "8",
    ],
}  # fmt: skip


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the first version's commands."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(folder: Path) -> tuple[list[str], Any]:
    store = ActivationStore.open(folder)
    return store.ids, store.tensor().tolist()


def test_a_store_is_completed(first: Path) -> None:
    tiny_dinov2(first / "dino")
    main([*EXTRACT, "--out", "extract-cut", "--resume"])
    names, numbers = rows(first / "extract-cut" / "block1")
    wanted_names, wanted = rows(first / "extract" / "block1")
    assert names == wanted_names and len(names) == 6
    assert [
        row == pytest.approx(other, abs=1e-6) for row, other in zip(numbers, wanted, strict=True)
    ]
    before = (first / "extract" / "block1" / "manifest.json").read_bytes()
    main([*EXTRACT, "--out", "extract", "--resume"])
    assert (first / "extract" / "block1" / "manifest.json").read_bytes() == before


def test_training_runs_are_resumed(first: Path) -> None:
    main([*KSAE, "--out", "ksae-cut", "--resume"])
    main([*DIFFC, "--out", "diffc-cut", "--resume"])
    main([*DIFFC, "--out", "diffc", "--resume"])
    steps = [line["step"] for line in lines(first / "ksae-cut")]
    assert steps == [1, 2, 3, 4]
    for name in ("ksae-cut", "diffc-cut", "diffc"):
        assert read_json(first / name / "manifest.json")["status"] == "finished"
    assert len(lines(first / "diffc-cut")) == 3


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [yaml.safe_load(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_llava_runs_are_resumed_and_the_cache_is_gone_on_with(first: Path, monkeypatch) -> None:
    monkeypatch.chdir(first / "llava")
    tiny_clip(Path("clip"))
    tower = TowerConfig("clip", "block1", tokens="pool", budget=4)
    model = model_config(tiny_llama(Path("lm")), tower, template="tokenizer", system="")
    small: dict[str, Any] = {"effective_batch": 4, "batch_size": 2, "zero": 0, "threads": 1}
    stage = Pretrain(**small, save_steps=1, epochs=2.0)
    data = ConversationData(Path("data.json"), Path("images"))
    cut = PretrainConfig(out=Path("cut"), data=data, model=model, stage=stage, resume=True)
    run(cut)
    whole = [line["loss"] for line in lines(Path("pre"))]
    assert [line["loss"] for line in lines(Path("cut"))] == pytest.approx(whole, abs=1e-5)
    run(replace(cut, out=Path("pre")))
    cached = CacheConfig(cache=Path("cache"), data=data, model=model)
    assert list(fill(open_cache_job(cached, Processes()))) == []
    names = [f"{number}.png" for number in range(8)]
    with pytest.warns(UserWarning, match="knew pictures by name and size only"):
        grids = CachedGrids.open(Path("cache"), load_towers(model, "cpu"), Path("images"), names)
    assert grids.get("7.png")[0].shape == (16, 2, 2)


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_replaced_or_the_line_says_what_to_do(
    first: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No record says which files the first version wrote; those it always wrote are its own."""
    tiny_dinov2(first / "dino")
    mine = first / name / "notes.txt" if (first / name).is_dir() else first / "notes.txt"
    mine.write_text("mine")
    main(OUTPUTS[name])
    assert mine.read_text() == "mine"
    main(OUTPUTS[name])


def optional_settings(cls: Any, where: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every setting with a default, by its path, with that default in plain form."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for field in fields(cls):
        if field.default is MISSING and field.default_factory is MISSING:
            continue
        made = field.default if field.default_factory is MISSING else field.default_factory()
        path = (*where, field.name)
        found.append((path, to_plain({"": made})[""]))
        if is_dataclass(made):
            found += optional_settings(type(made), path)
    return found


def at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def without(values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {key: value for key, value in values.items() if key != first}
    return {**values, first: without(values[first], tuple(rest))}


CONFIGS = [
    train_ksae.Config(store=Path("store"), out=Path("run")),
    train_diffc.Config(),
    demo.Config(),
    PretrainConfig(),
    FinetuneConfig(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__module__)
def test_a_setting_that_was_added_since_does_not_stop_a_resume(config: Any, tmp_path: Path) -> None:
    text, whole = to_yaml(config), to_plain(config)
    paths = [
        path for path, default in optional_settings(type(config)) if at(whole, path) == default
    ]
    assert len(paths) > 5
    for number, path in enumerate(paths):
        older = yaml.safe_dump(without(whole, path), sort_keys=False)
        assert completed(config)(older) == text, path
        if number % 8 == 0:  # through the run folder as well
            Run.open(tmp_path / str(number), "t", older).close()
            Run.open(
                tmp_path / str(number), "t", text, resume=True, complete=completed(config)
            ).close()


def test_an_added_setting_with_another_value_is_refused(tmp_path: Path) -> None:
    config = PretrainConfig()
    older = without(to_plain(config), ("too_long",))
    Run.open(tmp_path / "run", "t", yaml.safe_dump(older, sort_keys=False)).close()
    now = replace(config, too_long="drop")
    with pytest.raises(ValueError, match="started with `too_long: stop`, not `too_long: drop`"):
        Run.open(tmp_path / "run", "t", to_yaml(now), resume=True, complete=completed(now))


@pytest.mark.parametrize("text", ["[]", "3", "unknown: 1", "a: [", ""])
def test_an_older_config_of_another_kind_is_compared_as_it_stands(
    tmp_path: Path, text: str
) -> None:
    config = PretrainConfig()
    Run.open(tmp_path / "run", "t", text).close()
    with pytest.raises(ValueError, match="was started with"):
        Run.open(tmp_path / "run", "t", to_yaml(config), resume=True, complete=completed(config))
