"""Probe tables and zero-shot runs from Python, against the single probes and a plain classification."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones_helpers import seeing_clip, tiny_sd
from data_helpers import write_class_folders
from scipy.stats import binomtest

from revelio.activations.store import write_store
from revelio.backbones.config import BackboneConfig
from revelio.backbones.prompts import class_texts
from revelio.backbones.registry import load_backbone
from revelio.cli import main
from revelio.data.config import DataConfig
from revelio.data.open import open_dataset
from revelio.pipelines.probe import ProbeConfig, probe
from revelio.pipelines.zero_shot import ZeroShotConfig, zero_shot
from revelio.probes.clip_zero_shot import clip_zero_shot
from revelio.probes.config import DiffusionClassifierConfig
from revelio.probes.diffusion_classifier import diffusion_classifier
from revelio.probes.linear import linear_probe
from revelio.stats import paired

CLASSES = ("ant", "bee", "cow")


def grids(labels: np.ndarray, signal: float, seed: int) -> torch.Tensor:
    rows = torch.randn(len(labels), 8, 2, 2, generator=torch.Generator().manual_seed(seed))
    rows[torch.arange(len(labels)), torch.from_numpy(labels)] += signal
    return rows


def store(folder: Path, labels: np.ndarray, signal: float, seed: int, names: str) -> Path:
    settings = {"model": "m", "layer": folder.name, "classes": list(CLASSES), "dataset": "toy"}
    ids = [f"{names}{i}" for i in range(len(labels))]
    write_store(folder, grids(labels, signal, seed), ids, labels.tolist(), settings=settings)
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """A layer with the classes in it, and one with noise alone."""
    root = tmp_path_factory.mktemp("stores")
    train, test = np.arange(90) % 3, np.arange(150) % 3
    made = [
        [store(root / part / name, labels, signal, seed, part) for name, signal in layers]
        for part, labels, seed in (("train", train, 0), ("test", test, 1))
        for layers in [(("good", 1.5), ("noise", 0.0))]
    ]
    return made[0], made[1]


def test_a_table_of_probes_is_the_probes_own(stores, tmp_path, capsys):
    train, test = stores
    config = ProbeConfig(
        store=tuple(train),
        test_store=tuple(test),
        probes=("linear", "knn", "attention"),
        seeds=2,
        epochs=3,
        device="cpu",
        out=tmp_path / "probes.json",
    )
    found = probe(config)
    assert capsys.readouterr().out == "" and json.loads(found.path.read_text()) == found.result
    with pytest.raises(ValueError, match="holds a result of `seeds: 2`, not `seeds: 1`"):
        probe(replace(config, seeds=1))
    assert json.loads(found.path.read_text()) == found.result
    by_name = {(entry["store"], entry["probe"]): entry for entry in found.entries}
    assert len(by_name) == 6 and found.result["chance"] == pytest.approx(1 / 3)
    labels, test_labels = np.arange(90) % 3, np.arange(150) % 3
    right = {}
    for name in ("good", "noise"):
        rows, others = (
            grids(*args).mean((2, 3)).numpy()
            for args in (
                (labels, 1.5 * (name == "good"), 0),
                (test_labels, 1.5 * (name == "good"), 1),
            )
        )
        plain = [linear_probe(rows, labels, others, test_labels, seed=seed) for seed in (0, 1)]
        assert by_name[name, "linear"]["values"] == [one.score.value for one in plain]
        right[name] = np.array([one.predicted for one in plain]) == test_labels
    best = max(found.entries, key=lambda entry: np.mean(entry["values"]))
    assert best["verdict"] == "best" and best["store"] == "good"
    if best["probe"] == "linear":
        gap = paired(right["noise"], right["good"])
        assert by_name["noise", "linear"]["to_best"]["value"] == pytest.approx(gap.value, abs=1e-4)
    for name in ("linear", "knn", "attention"):
        assert by_name["noise", name]["verdict"] == "below the best"
        assert by_name["noise", name]["low"] < 1 / 3 < by_name["noise", name]["high"]


def test_stores_that_no_probe_can_take_are_refused(stores, tmp_path):
    train, test = stores
    config = ProbeConfig(store=(train[0],), test_store=(test[0],), out=tmp_path / "p.json")
    with pytest.raises(ValueError, match="1 training store and 2 test stores"):
        probe(replace(config, test_store=tuple(test)))
    with pytest.raises(ValueError, match="90 of the 90 test images"):
        probe(replace(config, test_store=(train[0],)))
    rows, ids = torch.randn(9, 8), [str(i) for i in range(9)]
    bare = write_store(tmp_path / "bare", rows, ids)
    with pytest.raises(ValueError, match="bare has no labels"):
        probe(replace(config, test_store=(bare.path,)))
    settings = {"classes": ["ant", "bee", "elk"], "layer": "good"}
    flat = write_store(tmp_path / "flat", rows, ids, [0, 1, 2] * 3, settings=settings)
    with pytest.raises(ValueError, match="needs grids"):
        probe(replace(config, store=(flat.path,), test_store=(write_store(
            tmp_path / "flat2", rows, ["x" + i for i in ids], [0, 1, 2] * 3,
            settings=settings).path,), probes=("attention",)))  # fmt: skip
    with pytest.raises(ValueError, match="give stores of the same layer"):
        probe(replace(config, test_store=(flat.path,)))
    other = write_store(
        tmp_path / "other", grids(np.array([0]), 0, 0), ["a"], [0],
        settings={"classes": ["elk"], "layer": "good"},
    )  # fmt: skip
    with pytest.raises(ValueError, match="has no class elk"):
        probe(replace(config, test_store=(other.path,)))
    with pytest.raises(ValueError, match=r"good and .*noise differ in `layer` \(good and noise\)"):
        probe(replace(config, test_store=(test[1],)))
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(ValueError, match="is there and is not a table of probes"):
        probe(replace(config, out=tmp_path / "notes.json"))


def test_stores_of_other_models_or_of_the_same_pictures_are_not_tested_on(tmp_path):
    labels = np.arange(60) % 3
    about = {"model": "m", "layer": "up", "timestep": 25, "classes": list(CLASSES)}

    def made(name, seed, ids, **more):
        rows = grids(labels, 1.5, seed)
        settings = about | {"dataset": name} | more
        return write_store(tmp_path / name, rows, ids, labels.tolist(), settings=settings).path

    ids = [f"i{i}" for i in range(60)]
    train = made("a", 0, ids)
    config = ProbeConfig(store=(train,), test_store=(), out=tmp_path / "p.json")
    for key, value in (("model", "n"), ("layer", "down"), ("timestep", 100)):
        other = made(f"other-{key}", 1, ids, **{key: value})
        with pytest.raises(ValueError, match=f"differ in `{key}`"):
            probe(replace(config, test_store=(other,)))
    # Another data set's name does not make the same pictures others, nor equal names other pictures the same.
    with pytest.raises(ValueError, match="60 of the 60 test images"):
        probe(replace(config, test_store=(made("copy", 0, ids),)))
    assert probe(replace(config, test_store=(made("b", 1, ids),))).entries


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_class_folders(root / "images", {"ant": 3, "bee": 3}, size=32)
    tiny_sd(root / "sd")
    seeing_clip(root / "clip")
    return root


def test_a_stopped_diffusion_classifier_goes_on_to_the_same_rows(photos, tmp_path):
    plan = DiffusionClassifierConfig(samples=(2, 4), keep=(2,), images_at_once=2)
    config = ZeroShotConfig(
        data=DataConfig(source=str(photos / "images")),
        backbone=BackboneConfig(name=str(photos / "sd"), device="cpu"),
        classifier=plan,
        out=tmp_path / "run",
    )
    dataset = open_dataset(config.data)
    model = load_backbone(str(photos / "sd"), device="cpu")
    prompts = class_texts(dataset, None)
    expected = list(diffusion_classifier(model, dataset, prompts, plan))  # pyright: ignore

    def stop(progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zero_shot(config, stop)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 2 <= len(lines) < 6
    with pytest.raises(ValueError, match="already holds a run"):
        zero_shot(config)
    found = zero_shot(replace(config, resume=True))
    assert [row["id"] for row in found.rows] == list(dataset.ids)
    assert [row["predicted"] for row in found.rows] == [one.predicted for one in expected]
    np.testing.assert_allclose(
        [row["errors"] for row in found.rows], [one.errors for one in expected], rtol=1e-4
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:2] == lines[:2]
    right = sum(row["predicted"] == row["label"] for row in found.rows)
    interval = binomtest(right, 6).proportion_ci(method="wilson")
    assert found.report["low"] == pytest.approx(interval.low)
    assert found.report["seconds"] == pytest.approx(np.mean([row["seconds"] for row in found.rows]))
    again = zero_shot(replace(config, resume=True))
    assert again.report == found.report and again.rows == found.rows
    # The same names, other pictures: neither a finished nor an unfinished run goes on with them.
    (first, second) = sorted(Path(config.data.source).rglob("*.png"))[:2]
    before = first.read_bytes()
    first.write_bytes(second.read_bytes())
    try:
        with pytest.raises(ValueError, match="was started with another set of images"):
            zero_shot(replace(config, resume=True))
        (tmp_path / "run" / "report.json").unlink()
        with pytest.raises(ValueError, match="was started with another set of images"):
            zero_shot(replace(config, resume=True))
    finally:
        first.write_bytes(before)
    assert zero_shot(replace(config, resume=True)).rows == found.rows


def test_clip_from_the_command_line_is_the_librarys(photos, tmp_path, capsys):
    words = ["zero-shot", "--method", "clip", "--clip", str(photos / "clip"), "--device", "cpu"]
    words += ["--data.source", str(photos / "images"), "--out", str(tmp_path / "run")]
    main(words)
    assert "of 6 images (Wilson's 95 % interval; chance 50.0 %)" in capsys.readouterr().out
    dataset = open_dataset(DataConfig(source=str(photos / "images")))
    plain = clip_zero_shot(dataset, clip=str(photos / "clip"), device="cpu")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["predicted"] for row in rows] == plain.predicted
    assert json.loads((tmp_path / "run" / "report.json").read_text())["value"] == plain.score.value


def test_a_broken_picture_ends_zero_shot_or_is_left_out(photos, tmp_path):
    images = Path(shutil.copytree(photos / "images", tmp_path / "images"))
    whole = open_dataset(DataConfig(source=str(images)))
    (images / whole.ids[1]).write_bytes(b"no picture")
    clip = {"method": "clip", "clip": str(photos / "clip"), "device": "cpu"}
    stops = ZeroShotConfig(data=DataConfig(source=str(images)), out=tmp_path / "stops", **clip)
    with pytest.raises(ValueError, match=r"can't be read: .*; mend .* set on_error to skip"):
        zero_shot(stops)
    data = DataConfig(source=str(images), on_error="skip")
    found = zero_shot(replace(stops, data=data, out=tmp_path / "skips"))
    assert [row["id"] for row in found.rows] == [*whole.ids[:1], *whole.ids[2:]]
    assert len(found.report["skipped"]) == 1 and whole.ids[1] in found.report["skipped"][0]


def test_zero_shot_says_what_it_lacks(photos, tmp_path):
    flat = photos / "images" / "ant"
    config = ZeroShotConfig(data=DataConfig(source=str(flat)), out=tmp_path / "run")
    with pytest.raises(ValueError, match="has no labels, or one class alone"):
        zero_shot(config)
    config = replace(
        config, data=DataConfig(source=str(photos / "images")), templates=("{}", "a {}")
    )
    with pytest.raises(ValueError, match="2 templates: the Diffusion Classifier takes one"):
        zero_shot(config)
    seen = replace(
        config, templates=(), backbone=BackboneConfig(name=str(photos / "clip"), device="cpu")
    )
    with pytest.raises(ValueError, match="is no diffusion model"):
        zero_shot(seen)
    assert not (tmp_path / "run" / "report.json").exists()
