"""The advisor: measures against brute force and scikit-learn, planted layers, runs on tiny random models."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones_helpers import tiny_dinov2, tiny_sd
from data_helpers import write_class_folders
from PIL import Image
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from revelio.advisor.candidates import seconds_an_image
from revelio.advisor.config import AdviseConfig
from revelio.advisor.halving import (
    sizes,
)
from revelio.advisor.measures import (
    PENALTIES,
    channel_purity,
    effective_rank,
    measure,
    nested_order,
    right_by_linear,
    right_by_neighbors,
)
from revelio.backbones.config import BackboneConfig
from revelio.cli import main
from revelio.config import load_config, read_yaml, structure
from revelio.data.config import DataConfig
from revelio.diffc.config import TrainDiffCConfig
from revelio.pipelines.advise import advise, plan_advice
from revelio.seeds import key_seed

LABELS = np.arange(60) % 3


def rows_of(labels, signal, seed, width=8):
    drawn = np.random.default_rng(seed)
    return np.eye(3, width)[labels] * signal + drawn.normal(size=(len(labels), width))


def test_probes_are_scikit_learns():
    rows = rows_of(LABELS, 1.5, 0)
    parts = StratifiedKFold(5, shuffle=True, random_state=key_seed(3, "folds") % 2**32)
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
    expected = cross_val_predict(probe, rows, LABELS, cv=parts) == LABELS
    assert np.array_equal(right_by_linear(rows, LABELS, 3), expected) and expected.mean() > 0.5
    for image, right in enumerate(right_by_neighbors(rows, LABELS)):
        others = np.arange(60) != image
        nearest = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
        found = nearest.fit(rows[others], LABELS[others]).predict(rows[[image]])
        assert right == (found[0] == LABELS[image])


def test_purity_and_rank_by_brute_force():
    rows = rows_of(LABELS, 2.0, 1)
    pairs = []
    for channel in rows.T:
        top = LABELS[np.argsort(-channel)[:10]]
        pairs.append(np.mean([top[i] == top[j] for i in range(10) for j in range(10) if i != j]))
    assert channel_purity(rows, LABELS) == pytest.approx(np.mean(pairs))
    flat = np.outer(np.random.default_rng(0).normal(size=60), np.ones(8))
    assert effective_rank(flat) == pytest.approx(1.0, abs=1e-3)
    basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)) - 0.5)
    basis = basis - basis.mean(0)
    values = np.linalg.svd(basis, compute_uv=False)
    shares = values[values > 1e-9] / values.sum()
    assert effective_rank(basis) == pytest.approx(np.prod(shares**-shares), rel=1e-3)


def test_every_beginning_of_the_order_has_three_of_each_class():
    labels = [0] * 40 + [1] * 5 + [2] * 15
    order = nested_order(labels, 60, seed=2)
    assert sorted(order) == list(range(60))
    assert np.bincount(np.array(labels)[order[:9]]).tolist() == [3, 3, 3]
    assert order != nested_order(labels, 60, seed=3)
    assert sizes(32, 400, 4) == [32, 128, 400] and sizes(500, 400, 4) == [400]
    assert sizes(32, 140, 4) == [32, 140]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("advice")
    write_class_folders(root / "images", {"ant": 12, "bee": 12}, size=16)
    tiny_sd(root / "sd")
    tiny_dinov2(root / "dino")
    return root


def config_of(made: Path, out: Path, **changes) -> AdviseConfig:
    config = AdviseConfig(
        data=DataConfig(source=str(made / "images")),
        backbone=BackboneConfig(name=str(made / "sd"), device="cpu"),
        others=(str(made / "dino"),),
        layers=("bottleneck", "up_ft1", "block1"),
        timesteps=(25, 400),
        prompts=("empty", "generic"),
        first_images=10,
        most_images=24,
        growth=2,
        out=out,
    )
    return replace(config, **changes)


def steady(*asked):  # two runs time the same candidates differently
    return {one: 1.0 + number for number, one in enumerate(seconds_an_image(*asked))}


def test_an_advice_is_whole_and_a_stopped_one_goes_on(made, tmp_path, capsys, monkeypatch):
    from llava_ext.config import ModelConfig

    monkeypatch.setattr("revelio.pipelines.advise.seconds_an_image", steady)
    config = config_of(made, tmp_path / "advice")

    def stop(progress):
        if progress.message.endswith("on 24 images"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        advise(config, stop)
    first = {p: p.stat().st_mtime_ns for p in (config.out / "activations").rglob("*.safetensors")}
    assert first and not (config.out / "report.json").exists()
    picture = made / "images" / "ant" / "0.png"
    before = picture.read_bytes()
    picture.write_bytes((made / "images" / "bee" / "0.png").read_bytes())
    try:
        with pytest.raises(ValueError, match="was started with another set of images"):
            advise(replace(config, resume=True))
    finally:
        picture.write_bytes(before)
    told = []
    found = advise(replace(config, resume=True), lambda progress: told.append(progress.message))
    assert [line.startswith("plan: 9 candidates, 5 passes on 10 images, ") for line in told if line] == [
        True, *(len(found.result["rounds"]) * [False]),
    ]  # fmt: skip
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    whole = advise(config_of(made, tmp_path / "whole"))
    assert capsys.readouterr().out == ""

    def timeless(result):
        text = json.dumps(result, sort_keys=True)
        return [part for part in text.split(", ") if "seconds" not in part]

    assert timeless(found.result) == timeless(whole.result)
    entries = found.result["candidates"]
    assert len(entries) == 2 * 2 * 2 + 1
    assert sum(entry["model"].endswith("dino") for entry in entries) == 1
    assert all(entry["seconds"] > 0 for entry in entries)
    best = found.result["recommended"]
    assert best["images"] == 24 and best["left"] is None and best in entries
    racing = [entry for entry in entries if entry["left"] is None]
    equals = [entry for entry in racing if names(entry) in found.result["contenders"]]
    assert best == min(equals, key=lambda entry: entry["seconds"])
    top = max(entry["linear"]["value"] for entry in racing)
    assert top in [entry["linear"]["value"] for entry in equals]
    second = found.result["runner_up"]
    others = [entry["linear"]["value"] for entry in racing if entry != best]
    assert second["linear"]["value"] == max(others)
    assert any("control: with shuffled labels" in line for line in found.words)
    diffc = load_config(TrainDiffCConfig, config.out / "diffc.yaml")
    assert (diffc.layer, diffc.timestep, diffc.backbone.name) == (
        best["layer"],
        best["timestep"],
        best["model"],
    )
    model = structure(ModelConfig, read_yaml(config.out / "llava_tower.yaml")["model"])
    assert (model.towers[-1].layer, model.towers[-1].timestep) == (best["layer"], best["timestep"])
    with Image.open(config.out / "heat_map.png") as picture:
        assert picture.width > 200 and len(picture.getcolors(100_000)) > 5


def names(entry):
    return {key: entry[key] for key in ("model", "layer", "timestep", "prompt")}


def test_rows_are_the_models_own(made, tmp_path):
    from revelio.activations.store import ActivationStore
    from revelio.backbones.registry import load_backbone
    from revelio.data.open import open_dataset

    config = config_of(
        made, tmp_path / "advice", others=(), layers=("bottleneck",), timesteps=(25,)
    )
    found = advise(config)
    dataset = open_dataset(config.data)
    order = nested_order(dataset.labels, len(dataset), 0)
    model = load_backbone(config.backbone)
    rows = []
    for index in order:
        pixels = model.transform(dataset.read(index))[None]
        grid = model.activations(
            model.encode(pixels), [dataset.ids[index]], ["bottleneck"], timestep=25, prompts=[""]
        )
        rows.append(grid["bottleneck"].float().mean((2, 3)))
    stored = [
        ActivationStore.open(path.parent)
        for path in sorted((config.out / "activations").glob("*-empty/*/manifest.json"), key=str)
    ]
    stored.sort(key=lambda store: int(store.path.parent.name.split("-")[0]))
    torch.testing.assert_close(
        torch.cat([store.tensor() for store in stored]), torch.cat(rows), atol=1e-4, rtol=1e-3
    )
    labels = np.array(dataset.labels)[order]
    own = measure(torch.cat(rows).numpy(), labels, 0)
    entry = next(e for e in found.result["candidates"] if e["prompt"] == "empty")
    assert entry["knn"]["value"] == pytest.approx(own.value("knn"), abs=1e-4)


def test_without_labels_it_goes_by_rank_and_says_so(made, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((made / "images").rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    words = [
        "advise",
        "--data.source",
        flat,
        "--backbone.name",
        made / "sd",
        "--out",
        tmp_path / "o",
    ]
    words += ["--backbone.device", "cpu", "--layers", "bottleneck", "up_ft1", "--timesteps", 25]
    main(list(map(str, words)))
    said = capsys.readouterr().out
    assert "there are no labels, so nothing ranks" in said and "train-diffc" not in said
    assert not any(word in said for word in ("recommended", "runner-up", "best"))
    result = json.loads((tmp_path / "o" / "report.json").read_text())
    main(shlex.split(said.splitlines()[-1].removeprefix("next: revelio ")))
    (store,) = (tmp_path / "o-activations").glob("*/manifest.json")
    made_of = json.loads(store.read_text())
    for key in ("layer", "timestep"):
        assert made_of[key] == result["recommended"][key]
    entries = result["candidates"]
    assert result["recommended"]["rank"] == max(entry["rank"] for entry in entries)
    assert result["difference"] is None and "linear" not in entries[0]


def test_a_plan_is_the_race_s_own_and_writes_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr("revelio.pipelines.advise.seconds_an_image", steady)
    config, told = config_of(made, tmp_path / "advice"), []
    cost = plan_advice(config, lambda progress: told.append(progress.message))
    assert not config.out.exists()
    with pytest.raises(KeyboardInterrupt):
        advise(config, lambda progress: _stop_at_the_plan(progress.message, told))
    (plan, own) = (line for line in told if line.startswith("plan: "))
    assert (
        plan.partition(": ")[0] == own.partition(": ")[0]
        and plan.split(":")[1] == own.split(":")[1]
    )
    # By hand: nine candidates, five passes, of which rounds keep half and one more a further model.
    assert (cost.candidates, cost.images, cost.passes[0]) == (9, (10, 24), 5)
    assert sum(cost.seconds) > 0
    with pytest.raises(ValueError, match="nothing-known"):
        plan_advice(replace(config, prompts=("nothing-known",)))


def _stop_at_the_plan(message, told):
    told.append(message)
    if message.startswith("plan: "):
        raise KeyboardInterrupt


def test_what_cannot_be_advised_on_is_one_line(made, tmp_path):
    write_class_folders(tmp_path / "few", {"ant": 9, "bee": 2}, size=8)
    config = config_of(made, tmp_path / "o", data=DataConfig(source=str(tmp_path / "few")))
    with pytest.raises(ValueError, match="class bee has 2 images, 5 are needed"):
        advise(config)
    write_class_folders(tmp_path / "many", {f"c{i}": 5 for i in range(5)}, size=8)
    many = DataConfig(source=str(tmp_path / "many"))
    with pytest.raises(ValueError, match="most_images is 24, and 5 classes need 25"):
        advise(replace(config, data=many))
    with pytest.raises(KeyError, match="unknown layer 'up_ft9'"):
        advise(config_of(made, tmp_path / "o", layers=("up_ft9",)))
    with pytest.raises(ValueError, match="1500 is outside"):
        advise(config_of(made, tmp_path / "o", timesteps=(25, 1500)))
    assert not (tmp_path / "o").exists(), "the corrected settings must begin"
    with pytest.raises(ValueError, match="there is one candidate"):
        one = {"layers": ("bottleneck",), "timesteps": (25,), "prompts": ("empty",), "others": ()}
        advise(config_of(made, tmp_path / "p", **one))
