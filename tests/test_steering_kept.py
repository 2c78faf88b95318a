"""Steering commands that are stopped go on with the pictures that they have drawn."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones_helpers import tiny_sd
from files_helpers import bury, bury_partials, killed_at, results
from PIL import Image
from steering_helpers import ksae_of

from revelio.backbones.config import BackboneConfig
from revelio.backbones.weights_hash import pipeline_hash
from revelio.pipelines.steer import steer
from revelio.pipelines.steer_eval import steer_eval
from revelio.pipelines.steer_parts import open_pipeline
from revelio.steering import draw as drawing
from revelio.steering.concept import Concept
from revelio.steering.config import SteerConfig, SteerEvalConfig
from revelio.steering.edits import Direction, Edit, LatentChange
from revelio.steering.kept import DRAWN, Kept

LAYER = "text_encoder.block1"
METHODS, PROMPTS = 4, 3  # plain, steered, negative prompt, random direction


class Stopped(Exception):
    """What ends a run in the middle of it."""


def see(pictures: Sequence[Image.Image]) -> list[str]:
    return ["cat" if np.asarray(one).mean() < 128 else "dog" for one in pictures]


def breaks(pictures: Sequence[Image.Image]) -> list[str]:
    raise Stopped


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> SteerEvalConfig:
    root = tmp_path_factory.mktemp("asked")
    table = root / "prompts.csv"
    table.write_text("prompt,class\na cat,cat\nmeow,cat\na dog,dog\n")
    vector = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    Concept("tiny", LAYER, vector, {}).save(root / "concept")
    return SteerEvalConfig(
        backbone=BackboneConfig(name=str(tiny_sd(root / "tiny"))),
        prompts_file=str(table),
        concept=(root / "concept",),
        target=("cat",),
        strength=(-5.0,),
        judge=f"{__name__}:see",
        steps=1,
        size=32,
        batch_size=1,
        bootstrap=9,
        out=root / "whole",
    )


@pytest.fixture(autouse=True)
def opened_once(asked: SteerEvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is opened once; nothing is flushed, which no stop can see."""
    layers = open_pipeline(asked.backbone)
    for module in ("steer", "steer_eval"):
        monkeypatch.setattr(f"revelio.pipelines.{module}.open_pipeline", lambda config: layers)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts drawn, after the number of the one at which drawing stops; None: at none."""
    real, told = drawing.draw, []

    def draw(layers: Any, batch: Any, *others: Any) -> list[Image.Image]:
        told.append(batch[0].text)
        if told[0] == len(told) - 1:
            raise Stopped
        return real(layers, batch, *others)

    monkeypatch.setattr(drawing, "draw", draw)
    return told


@pytest.fixture(scope="module")
def whole(asked: SteerEvalConfig) -> dict[str, Any]:
    steer_eval(asked)
    return results(asked.out)


@pytest.mark.parametrize("number", [1, 2, 6, 12])
def test_a_stopped_measure_goes_on_to_the_same(
    asked: SteerEvalConfig, tmp_path: Path, whole: dict[str, Any], draws: list[Any], number: int
) -> None:
    config = replace(asked, out=tmp_path / "out")
    draws.append(number)
    with pytest.raises(Stopped):
        steer_eval(config)
    assert len(list((config.out / DRAWN).glob("*"))) == number - 1
    draws[:] = [None]
    report = steer_eval(config)
    assert len(draws) - 1 == METHODS * PROMPTS - (number - 1)  # nothing is drawn twice
    assert results(config.out) == whole
    assert not (config.out / DRAWN).exists()
    assert all(one["seconds"] > 0 for one in report["methods"])


def test_pictures_are_kept_where_a_judge_breaks_and_taken_by_another(
    asked: SteerEvalConfig, tmp_path: Path, whole: dict[str, Any], draws: list[Any]
) -> None:
    config = replace(asked, out=tmp_path / "out")
    draws.append(None)
    with pytest.raises(Stopped):
        steer_eval(replace(config, judge=f"{__name__}:breaks", bootstrap=5))
    assert draws[1:] == ["a cat", "meow", "a dog"]  # the plain ones
    steer_eval(config)
    assert len(draws) - 1 == METHODS * PROMPTS
    assert results(config.out) == whole


@pytest.mark.parametrize(
    "changed",
    [{"steps": 2}, {"seed": 1}, {"guidance": 3.0}, {"size": 64}, {"batch_size": 2}],
    ids=lambda one: next(iter(one)),
)
def test_other_settings_draw_anew(
    asked: SteerEvalConfig, tmp_path: Path, draws: list[Any], changed: dict[str, Any]
) -> None:
    config = replace(asked, out=tmp_path / "out", **changed)
    draws.append(4)
    with pytest.raises(Stopped):
        steer_eval(replace(asked, out=config.out))
    draws[:] = [None]
    steer_eval(config)
    pictures = {path.name: path.read_bytes() for path in (config.out / "pictures").iterdir()}
    # The third of three prompts is by itself in batches of two as well: its plain picture is the same.
    batches, same = (2, 1) if "batch_size" in changed else (PROMPTS, 0)
    assert len(draws) - 1 == METHODS * batches - same
    steer_eval(replace(config, out=tmp_path / "anew"))
    anew = {path.name: path.read_bytes() for path in (tmp_path / "anew" / "pictures").iterdir()}
    assert pictures == anew
    assert not (config.out / DRAWN).exists()  # nor what the first settings had drawn


def test_a_measure_killed_before_any_file_operation_is_given_again_to_the_same(
    asked: SteerEvalConfig, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 1000, 71):
        config = replace(asked, out=tmp_path / str(number))
        if not killed_at(number, lambda config=config: steer_eval(config), monkeypatch):
            break
        bury(config.out / ".lock")
        bury_partials(config.out)
        steer_eval(config)
        assert results(config.out) == whole, number
    assert number > 200


def test_drawing_by_strengths_goes_on_too(
    asked: SteerEvalConfig, tmp_path: Path, draws: list[Any]
) -> None:
    config = SteerConfig(
        backbone=asked.backbone, concept=asked.concept, texts=("a", "b"), strength=(0.0, 2.0),
        steps=1, size=32, batch_size=1, out=tmp_path / "whole",
    )  # fmt: skip
    draws.append(None)
    steer(config)
    cut = replace(config, out=tmp_path / "cut")
    draws[:] = [4]
    with pytest.raises(Stopped):
        steer(cut)
    draws[:] = [None]
    steer(cut)
    assert draws[1:] == ["b"]
    assert results(cut.out) == results(config.out)


@pytest.mark.parametrize("what", ["picture", "record", "file", "link"])
def test_what_a_stopped_run_did_not_leave_is_refused_and_stays(
    asked: SteerEvalConfig, tmp_path: Path, draws: list[Any], what: str
) -> None:
    config = replace(asked, out=tmp_path / "out")
    draws.append(2)
    if what in ("picture", "record"):
        with pytest.raises(Stopped):
            steer_eval(config)
        (place,) = (config.out / DRAWN).iterdir()
        if what == "picture":
            Image.new("RGB", (32, 32)).save(place / "000000-0.png")
        else:
            (place / "batch.json").write_text(json.dumps({"seconds": 1, "pictures": {}}))
        said = "does not hold the pictures that a stopped run kept: remove it"
    else:
        config.out.mkdir()
        (tmp_path / "other").mkdir()
        place = config.out / DRAWN
        place.write_text("mine") if what == "file" else place.symlink_to(tmp_path / "other")
        said = {"file": "is a file, not a folder", "link": "is a link"}[what]
    before = results(config.out)
    draws[:] = [None]
    with pytest.raises(ValueError, match=said):
        steer_eval(config)
    assert results(config.out) == before and draws == [None]


def test_files_of_others_among_the_kept_pictures_stay(
    asked: SteerEvalConfig, tmp_path: Path
) -> None:
    mine = tmp_path / "out" / DRAWN / "mine"
    mine.mkdir(parents=True)
    (mine / "0-0.png").write_text("precious")
    steer_eval(replace(asked, out=tmp_path / "out"))
    assert [path.name for path in mine.parent.iterdir()] == ["mine"]
    assert (mine / "0-0.png").read_text() == "precious"


def edits() -> dict[str, Edit]:
    """An edit, and others that differ from it in one thing each."""
    vector = torch.ones(1, 16)
    ksae, other = ksae_of(16), ksae_of(16)
    with torch.no_grad():
        other.W_enc[0, 0] += 1
    one = Edit("up_ft0", Direction(vector), 16)
    change = LatentChange(ksae, {1: 2.0})
    latents = replace(one, change=change)
    return {
        "one": one,
        "vector": replace(one, change=Direction(2 * vector)),
        "shape": replace(one, change=Direction(vector.view(2, 8))),
        "layer": replace(one, layer="up_ft1"),
        "strength": replace(one, strength=0.5),
        "branch": replace(one, branch="both"),
        "timesteps": replace(one, timesteps=(0, 9)),
        "mask": replace(one, mask=torch.ones(2, 2)),
        "latents": latents,
        "value": replace(one, change=replace(change, values={1: 3.0})),
        "latent": replace(one, change=replace(change, values={2: 2.0})),
        "operation": replace(one, change=replace(change, operation="clamp")),
        "read": replace(one, change=replace(change, read="pooled")),
        "where": replace(one, change=replace(change, where="fires")),
        "encoder": replace(one, change=replace(change, ksae=other)),
    }


def test_whatever_an_edit_or_a_model_differs_in_has_another_key(
    asked: SteerEvalConfig, tmp_path: Path
) -> None:
    layers = open_pipeline(asked.backbone)
    kept = Kept.of(tmp_path, layers, asked.backbone)
    keys = {name: kept.steered([one]).key for name, one in edits().items()}
    assert len({*keys.values(), kept.key, kept.steered([]).key}) == len(keys) + 2
    assert keys == {name: kept.steered([one]).key for name, one in edits().items()}
    elsewhere = replace(asked.backbone, device="cpu")
    assert Kept.of(tmp_path, layers, elsewhere).key == kept.key
    before = pipeline_hash(layers.pipeline)
    changes: list[Callable[[], object]] = [
        lambda: layers.pipeline.vae.quant_conv.bias.data.add_(1),
        lambda: layers.pipeline.scheduler.register_to_config(beta_end=0.5),
    ]
    for change in changes:
        change()
        assert Kept.of(tmp_path, layers, asked.backbone).key != kept.key
        assert pipeline_hash(layers.pipeline) != before
        before = pipeline_hash(layers.pipeline)
