"""The demo end to end on a tiny random model and small generated pictures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones_helpers import tiny_sd
from browser_helpers import Page, needs_browser
from PIL import Image

from revelio.activations.store import ActivationStore
from revelio.analysis.paired import BEATS, strongest
from revelio.cli import main
from revelio.data.config import DataConfig
from revelio.pipelines.demo.config import DemoConfig
from revelio.pipelines.demo.diffc import headline, verdicts
from revelio.pipelines.demo.report import write_report
from revelio.pipelines.demo.run import findings
from revelio.pipelines.demo.stages import demo_images, shown_cell
from revelio.pipelines.inputs import open_sae
from revelio.stats import NOT_APART as APART
from revelio.stats import NOT_COMPARED as ONCE

CLASSES = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
SMALL = [
    *(
        "--layers",
        "up_ft1",
        "up_ft3",
        "--timesteps",
        "25",
        "200",
        "--sae.k",
        "4",
        "--sae.expansion",
        "1",
    ),
    *("--sae.steps", "20", "--sae.batch-size", "32", "--m", "4", "--width", "8", "--epochs", "2"),
    *(
        "--batch-size",
        "16",
        "--cell-sae.k",
        "2",
        "--cell-sae.steps",
        "20",
        "--cell-sae.expansion",
        "1",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_sd(folder)
    return folder


def make_pictures(folder: Path, each: int, *, labelled: bool = True) -> Path:
    noise = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        for number in range(each):
            pixels = np.array(colour) + noise.integers(-30, 30, (32, 32, 3))
            path = folder / name / f"{number}.png" if labelled else folder / f"{name}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path)
    return folder


def test_the_whole_job_on_labelled_pictures(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = make_pictures(tmp_path / "images", 170), tmp_path / "run"
    flags = ["--data.source", str(images), "--backbone.name", str(model), "--out", str(out), *SMALL]
    main(["demo", *flags, "--train-images", "48"])
    assert str(out / "report.html") in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    cells = {(row["layer"], row["timestep"]) for row in report["purity"]}
    assert cells == {(layer, t) for layer in ("up_ft1", "up_ft3") for t in (25, 200)}
    for row in report["purity"]:
        assert {"sigma_label", "chance", "majority_share", "entropy", "null_z"} <= set(row)
        low, high = row["interval"]["majority_share"]
        assert low <= row["majority_share"] <= high
        # Three classes of equal size: ids 0, 1, 2 drawn without repetition.
        assert row["chance"] == pytest.approx(0.8, abs=0.05)
    assert report["images"] == 48 and report["test_images"] == 102 and report["mode"] == "fixed"
    for row in report["diffc"]:
        keys = {"top1", "interval", "pixels_top1", "random_weights_top1"}
        assert keys <= set(row) and row["interval"][0] <= row["top1"] <= row["interval"][1]
    stages = {"extraction", "k-SAEs", "purity", "raw pixels", "k-SAE of cells", "gallery", "Diff-C"}
    assert set(report["seconds"]) == stages
    page = (out / "report.html").read_text()
    # The k-SAE of cells, judged again by hand: its error on all cells of the held-out pictures.
    found = report["cells"]
    assert report["shown"] == {key: found["ksae"][key] for key in ("layer", "timestep")}
    (store,) = (path.parent for path in (out / "cells" / "test").glob("*/manifest.json"))
    rows = torch.cat([batch for _, batch in ActivationStore.open(store).batches(64)])
    rows = rows.flatten(2).transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        left = (open_sae(str(out / "cells" / "ksae"), "cpu")(rows) - rows).double().square().sum()
    fvu = found["held_out"]["measures"]["fvu"]
    assert fvu["value"] == pytest.approx(
        float(left / (rows - rows.mean(0)).double().square().sum()), rel=1e-4
    )
    assert f"<td>{fvu['value']:.3f}</td>" in page and found["held_out"]["images"] == 102
    _, control = strongest(fvu) or ("", {})
    assert control["value"] == min(one["value"] for one in fvu["controls"].values())
    assert f"{control['difference']['interval'][0]:+.3f}" in page
    first = json.loads((out / "gallery" / "latents.jsonl").read_text().splitlines()[0])
    assert first["maps"]
    for row in (*report["purity"], report["pixels"]):
        assert f"{row['majority_share']:.3f}" in page
    (flat,) = (path.parent for path in (out / "pixels").glob("*/manifest.json"))
    rows = torch.cat([batch for _, batch in ActivationStore.open(flat).batches(64)])
    assert rows.shape == (48, 768)
    assert (out / "gallery" / "index.html").exists()
    for source in re.findall(r'<img src="([^"]+)"', page):
        assert (out / source).exists()


def test_a_finished_demo_is_shown_again_and_a_cut_one_goes_on(tmp_path: Path, model: Path) -> None:
    images, out = make_pictures(tmp_path / "images", 8), tmp_path / "run"
    flags = ["--data.source", str(images), "--backbone.name", str(model), "--out", str(out), *SMALL]
    main(["demo", *flags])
    before = json.loads((out / "report.json").read_text())
    with pytest.raises(SystemExit):
        main(["demo", *flags])
    # What a stop in the middle leaves: the stages from purity on are not there.
    for name in ("purity", "gallery", "Diff-C"):
        (out / "stages" / f"{name}.json").unlink()
    main(["demo", *flags, "--resume"])
    after = json.loads((out / "report.json").read_text())
    assert [row["majority_share"] for row in after["purity"]] == [
        row["majority_share"] for row in before["purity"]
    ]
    assert [row["top1"] for row in after["diffc"]] == [row["top1"] for row in before["diffc"]]


def test_pictures_without_labels(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = make_pictures(tmp_path / "images", 20, labelled=False), tmp_path / "run"
    flags = ["--data.source", str(images), "--backbone.name", str(model), "--out", str(out), *SMALL]
    main(["demo", *flags])
    *_, said, more = capsys.readouterr().out.splitlines()
    assert "revelio steer" in more
    assert said.startswith(f"next: revelio extract --data.source {images} --backbone.name {model}")
    report = json.loads((out / "report.json").read_text())
    assert report["labelled"] is False and report["diffc"] == []
    # Similarities of layers of different widths rank nothing: not in words, nor by a mark in the table.
    assert report["best"] is None and "nothing ranks layers" in report["findings"][0]["text"]
    page = (out / "report.html").read_text()
    assert 'class="best"' not in page and "do not rank layers" in page
    assert all(row["majority_share"] is None for row in report["purity"])
    assert all(row["similarity"] is not None for row in report["purity"])
    assert "have no labels" in (out / "report.html").read_text()


def config(images: Path, train: int, test: int) -> DemoConfig:
    data = DataConfig(source=str(images))
    return DemoConfig(data=data, train_images=train, test_images=test)


def test_a_fifth_of_every_class_is_held_out(tmp_path: Path) -> None:
    images = make_pictures(tmp_path / "images", 10)
    train, test = demo_images(config(images, 100, 100))
    assert test is not None and train.labels is not None and test.labels is not None
    assert sorted(test.labels) == [0, 0, 1, 1, 2, 2] and len(train) == 24
    assert not set(train.ids) & set(test.ids)
    few, fewer = demo_images(config(images, 12, 3))
    assert fewer is not None and (len(few), len(fewer)) == (12, 3)


def test_the_shown_cell_is_surely_the_purest_and_without_labels_nothing_is_ranked() -> None:
    a = {"layer": "a", "majority_share": 0.5, "interval": {"majority_share": [0.48, 0.52]}}
    b = {"layer": "b", "majority_share": 0.6, "interval": {"majority_share": [0.55, 0.65]}}
    # The highest share, of too few latents to be sure.
    few = {"layer": "few", "majority_share": 0.7, "interval": {"majority_share": [0.50, 0.90]}}
    assert shown_cell([a, b, few])["layer"] == "b"
    c = {"layer": "c", "majority_share": None, "similarity": 0.2, "similarity_chance": 0.0}
    d = {"layer": "d", "majority_share": None, "similarity": 0.9, "similarity_chance": 0.0}
    assert shown_cell([c, d])["layer"] == "c"


def test_findings_name_a_winner_only_where_intervals_support_one() -> None:
    share = {"majority_share": 0.75, "majority_share_chance": 0.25, "timestep": 25}
    best = {"layer": "up_ft1", **share, "interval": {"majority_share": [0.70, 0.80]}}
    near = {"layer": "up_ft0", "majority_share": 0.72, "interval": {"majority_share": [0.6, 0.71]}}
    far = {"layer": "up_ft3", "majority_share": 0.5, "interval": {"majority_share": [0.4, 0.6]}}
    best |= {
        "controls": {
            "data rows": {"majority": {"value": 0.83}},
            "channels": {"majority": {"value": 0.4}},
        },
        "verdict": {"majority": "beaten by data rows"},
    }
    row = {"layer": "up_ft1", "timestep": 25, "top1": 80.0, "pixels_top1": 70.0}
    judged = [row | {"verdict": verdict("above", "above")}]
    measures = {"fvu": BEATS, "purity": "beaten by data rows", "cosine": BEATS}
    said = {"measures": {name: {"verdict": one} for name, one in measures.items()}}
    cells = {"purity": best, "held_out": said}
    cards = findings(best, judged, 90.0, [best, near, far], cells)
    assert [card["value"] for card in cards] == [
        "up_ft1, t = 25",
        "75%",
        "2 of 3",
        "80.0 %",
        "1.5 min",
    ]
    assert cards[2]["text"].endswith("beats every control (fvu, cosine)")
    few = findings(best, judged, 90.0, [best], cells | {"held_out": None})
    assert [card["value"] for card in few] == ["up_ft1, t = 25", "75%", "80.0 %", "1.5 min"]
    assert "1 of the 2 others are not told apart" in cards[0]["text"]
    assert "the strongest control dictionary, data rows, reaches 83%" in cards[1]["text"]
    assert "is beaten by data rows" in cards[1]["text"]
    unlabelled = findings(best | {"majority_share": None}, [], 90.0, [best])
    assert "nothing ranks layers" in unlabelled[0]["text"]
    silent = findings(best | {"majority_share": None}, [], 90.0, [best], labelled=True)
    assert silent[0]["text"].endswith("no latent is active on enough images to rank layers by")


def verdict(pixels: str, *layers: str) -> dict[str, str]:
    others = {f"layer{number}": word for number, word in enumerate(layers)}
    return others | {"raw pixels": pixels, "random weights": "above"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            verdict("above", "above", "above"),
            "on x, more than on any other layer; above raw pixels",
        ),
        (verdict("below", "above", APART), "on x, not told apart from layer1; below raw pixels"),
        (verdict(APART, APART, APART), f"not told apart from 2 other layers; {APART} raw pixels"),
        (verdict("above"), "top-1 on x; above raw pixels (70.0 %)"),
        (verdict(ONCE), "top-1 on x; one training: not compared with raw pixels (70.0 %)"),
        (
            verdict(ONCE, ONCE),
            "on x; one training: not compared with the other layers or raw pixels (70.0 %)",
        ),
    ],
)
def test_the_headline_says_what_was_told_apart(words: dict[str, str], said: str) -> None:
    row = {"layer": "x", "top1": 80.0, "pixels_top1": 70.0, "verdict": words}
    assert said in headline([row, row | {"layer": "y", "top1": 60.0}])["text"]


def found(rng: np.random.Generator, share: float, trainings: int = 3) -> dict:
    """What Diff-C reports, as far as comparisons need it: 500 test images, right by chance."""
    wrong = [np.flatnonzero(rng.random(500) > share).tolist() for _ in range(trainings)]
    seeds = [{"last": {"test": {"wrong": one}}} for one in wrong]
    return {"selected": "last", "images": {"test": 500}, "seeds": seeds}


def test_no_layer_is_named_the_best_of_equals_nor_after_one_training() -> None:
    rng, named = np.random.default_rng(5), 0
    for _ in range(40):
        layers = {name: found(rng, 0.8) for name in "abcdefg"}
        words = verdicts(layers, layers, found(rng, 0.8))
        named += any(word != APART for one in words.values() for word in one.values())
    assert named <= 6  # 5 % of 40, and what chance adds, for each of two families
    better = {"a": found(rng, 0.9), "b": found(rng, 0.7), "c": found(rng, 0.71)}
    words = verdicts(better, {name: found(rng, 0.5) for name in better}, found(rng, 0.7))
    assert words["a"] == {
        "b": "above",
        "c": "above",
        "raw pixels": "above",
        "random weights": "above",
    }
    assert words["b"]["a"] == "below" and words["b"]["c"] == APART
    once = {name: found(rng, share, 1) for name, share in (("a", 0.9), ("b", 0.5))}
    for one in verdicts(once, once, found(rng, 0.2, 1)).values():
        assert set(one.values()) == {ONCE}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--layers", "up_ft9"], "up_ft9"),
        (["--timesteps", "25", "1500"], "1500"),
        (["--timesteps", "25", "25"], "twice"),
        (["--diffc-timestep", "1500"], "1500"),
        (["--sae.k", "5000"], "sae.k=5000, but a k-SAE of up_ft1 has"),
        (["--sae.prefixes", "9", "5"], "prefixes"),
        (["--m", "49"], "m=49 top images, but latents are judged on 48 images"),
        (["--test-images", "1"], "test_images"),
        (["--backbone.dtype", "float8"], "float8"),
    ],
)
def test_what_cannot_be_is_refused_before_the_folder_is_made(
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    said: str,
) -> None:
    images, out = make_pictures(tmp_path / "images", 20), tmp_path / "run"
    flags = ["--data.source", str(images), "--backbone.name", str(model), "--out", str(out), *SMALL]
    with pytest.raises(SystemExit):
        main(["demo", *flags, *wrong])
    assert said in capsys.readouterr().err
    assert not out.exists(), "the corrected command must begin"


@needs_browser
def test_the_demos_report_fits_a_phone(tmp_path):
    cell = {"layer": "up_ft1_with_a_long_name", "timestep": 25}
    purity = {
        "majority_share": 0.7, "majority_share_chance": 0.3, "sigma_label": 1.0, "chance": 2.0,
        "interval": {"majority_share": [0.6, 0.8]}, "similarity": 0.5, "latents": 9,
    }  # fmt: skip
    diffc = {
        "top1": 80.0, "interval": [70.0, 90.0], "pixels_top1": 60.0, "pixels_interval": [50.0, 70.0],
        "random_weights_top1": 40.0, "random_weights_interval": [30.0, 50.0],
    }  # fmt: skip
    report = {
        "model": "mini-sd", "dataset": "samples", "images": 100, "test_images": 10, "mode": "fixed",
        "labelled": True, "findings": [{"value": "up_ft1", "text": "words " * 20}], "best": cell,
        "shown": cell,
        "examples": [], "purity": [cell | purity, cell | purity | {"timestep": 200}], "diffc": [cell | diffc],
        "ksae": [cell | {"d": 4, "n": 8, "k": 2, "fvu": 0.1, "dead_share": 0.2}], "seconds": {"a": 1.0},
        "settings": {"m": 10, "a" * 60: "b" * 60}, "versions": {},
    }  # fmt: skip
    write_report(report, tmp_path / "report.html")
    browser = Page(tmp_path / "profile")
    browser.screen(390, 844, touch=True)
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.run("document.documentElement.scrollWidth") <= 390
    # Charts keep letters that can be read, and scroll in their frames.
    letters = browser.run(
        "[...document.querySelectorAll('figure text')].filter((t) => t.textContent).map((t) => "
        "parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"
    )
    assert len(letters) > 10 and min(letters) > 9
    browser.close()
