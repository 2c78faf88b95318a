"""The paper's items: every number, plans, a mini run end to end on a tiny model, orderings by brute force."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from backbones_helpers import tiny_if, tiny_sd
from command_helpers import fails
from PIL import Image, ImageOps
from test_sae_distributed import in_two

import revelio.pipelines.reproduce_rows as pipeline
from revelio.activations.store import ActivationStore
from revelio.analysis.config import PurityConfig
from revelio.analysis.paired import image_subsets
from revelio.backbones.registry import load_backbone
from revelio.charts import COLOURS
from revelio.cli import main
from revelio.data.config import DataConfig
from revelio.diffc.config import FitConfig
from revelio.distributed import Processes
from revelio.pipelines import silent
from revelio.pipelines.reproduce import reproduce
from revelio.pipelines.reproduce_parts import Shared
from revelio.pipelines.reproduce_plan import LATENT_BYTES, latents_of
from revelio.probes.config import DiffusionClassifierConfig
from revelio.reproduce.config import ReproduceConfig
from revelio.reproduce.items import item, items
from revelio.reproduce.orderings import judge
from revelio.reproduce.row import DELTA
from revelio.reproduce.rows import Sizes, our_rows
from revelio.sae.config import RunConfig

CSV = Path(pipeline.__file__).parents[1] / "reproduce" / "paper_experiments.csv"
TINY = Sizes(
    sae=RunConfig(k=4, expansion=2, steps=8, batch_size=32, checkpoint_every=0, held_out=0.0,
                  kernel="torch"),
    diffc=FitConfig(width=4, epochs=1, batch_size=16, validation=0.0),
    purity=PurityConfig(m=3, latents=20, random_sets=50, permutations=5, bootstrap=5),
    classifier=DiffusionClassifierConfig(samples=(2,), keep=()),
    probe_epochs=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ReproduceConfig:
    """60 pictures of three colors with noise, and a tiny random model."""
    root, noise = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    tiny_sd(root / "tiny-sd")
    for name, number in product(("red", "green", "blue"), range(20)):
        color = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}[name]
        pixels = (np.array(color) + noise.integers(-60, 60, (32, 32, 3))).clip(0, 255)
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype("uint8")).save(root / "images" / name / f"{number}.png")
    return ReproduceConfig(
        out=root / "out",
        backbones=(str(root / "tiny-sd"),),
        data=DataConfig(source=str(root / "images")),
        scale="mini",
        seeds=2,
        device="cpu",
    )


def test_every_number_of_the_paper_is_a_row_of_an_item_and_has_what_the_paper_claims() -> None:
    lines = list(csv.DictReader(CSV.read_text("utf-8").splitlines()))
    tables = [one for name, one in items().items() if name.startswith("table")]
    found = sorted(str(row.paper) for one in tables for row in one.rows if row.paper is not None)
    assert found == sorted(str(float(line["paper_value"])) for line in lines) and len(found) == 207
    for one in items().values():
        assert len(one.rows) == len({(row, row.paper) for row in one.rows})
        assert all(judge(claim, one.rows, {})["paper"] for claim in one.orderings)
    at = {(row.layer, row.dataset): row.paper for row in items()["figure4"].rows}
    assert at["up_ft1", "fgvc-aircraft"] == 65.07 and at["bottleneck", "oxford-iiit-pet"] == 69.97
    assert [row.paper for row in items()["figure3"].rows] == [9.48, 8.59, 9.67]


def test_a_purity_table_and_a_diffc_table_end_to_end(made: ReproduceConfig) -> None:
    table = reproduce("table2a", made, sizes=TINY)
    rows = table.result["rows"]
    pets = [row for row in rows if row["dataset"] == "oxford-iiit-pet"]
    assert all(len(row["values"]) == 2 and 0 <= row["value"] <= 1.2 for row in pets)
    # Ids 0, 1, 2 in equal numbers, three drawn of 48.
    assert all(row["chance"] == pytest.approx(0.88, abs=0.15) for row in pets)
    assert all(
        "stands in for oxford-iiit-pet only" in row["missing"] for row in rows if row not in pets
    )
    words = {one["text"]: one["verdict"] for one in table.result["orderings"]}
    assert words["(ii) sigma_label rises with depth on Caltech-101"] == "not judged"
    page = table.path.read_text()
    assert (
        "| 8.59 | " in page
        and f"{pets[2]['value']:.2f}" in page
        and "could not run, 4 of 8" in page
    )
    assert json.loads(table.path.with_suffix(".json").read_text()) == table.result
    drawn = ElementTree.parse(table.path.with_suffix(".svg"))
    space = "{http://www.w3.org/2000/svg}"
    texts = [one.text for one in drawn.iter(f"{space}text")]
    assert sum("tiny-sd up_ft1 t=25" in text for text in texts if text) == 1
    # Paper and ours of four rows, and of the legend; the interval and chance of each are lines.
    marks = [one.get("style", "") for one in drawn.iter(f"{space}use")]
    for colour in COLOURS[:2]:
        assert sum(f"fill: {colour}" in mark for mark in marks) == 4 + 1
    assert "(table2a.svg)" in page
    # One pass of the model gave all four layers, the VAE ran once.
    stores = sorted(path.name for path in made.out.glob("*/sets/*/train/mean/*"))
    assert len(stores) == 4 and all("-t25-empty-d0" in name for name in stores)

    table9 = reproduce("table9", replace(made, seeds=1), sizes=TINY).result["rows"]
    empty, clip, generic = table9[:3]
    assert clip["metric"] == generic["metric"] == DELTA and empty["metric"] == "top1"
    assert all(0 <= value <= 100 for value in empty["values"])
    report = json.loads(
        next(made.out.glob("*/rows/diffc*t25-generic/diffc-s1/report.json")).read_text()
    )
    assert generic["value"] == pytest.approx(100 * report["top1"] - empty["value"])


def test_two_processes_find_what_one_does(made: ReproduceConfig, tmp_path: Path) -> None:
    """Passes and rows are divided: each process trains some, and all numbers are those of one process."""
    one = reproduce("table2a", made, sizes=TINY).result
    in_two(Path(__file__), tmp_path, made.backbones[0], made.data.source)
    two = json.loads((tmp_path / "mini-fixed/table2a.json").read_text())
    assert two["rows"] == one["rows"] and two["orderings"] == one["orderings"]


def test_a_pass_that_one_process_can_not_make_none_begins(
    made: ReproduceConfig, tmp_path: Path
) -> None:
    other = Processes(1, 2, wait=lambda: None, gather=lambda own: ["no such model here", *own])
    rows = [one for one in our_rows(item("table2a").rows, made) if not one.missing][:1]
    shared = Shared(made, TINY, tmp_path / "out", rows, silent, other)
    shared.prepare(rows)
    with pytest.raises(ValueError, match="no such model here"):
        shared.store(rows[0], "train")
    assert not (tmp_path / "out").exists()


def test_classifiers_pictures_and_maps(made: ReproduceConfig, tmp_path: Path) -> None:
    config = replace(made, out=tmp_path, seeds=1)
    rows = reproduce("table5", config, sizes=replace(TINY, zero_shot_images=4)).result["rows"]
    measured = {(row["kind"], row["metric"]): row for row in rows if "missing" not in row}
    probes = ("linear", "knn", "attention", "resnet")
    classifiers = ("diffc", "diffusion-classifier", "clip", *probes)
    assert set(measured) == set(product(classifiers, ("top1", "s_per_image")))
    for (_, metric), row in measured.items():
        assert row["value"] > 0 if metric == "s_per_image" else 0 <= row["value"] <= 100
    assert measured["diffusion-classifier", "top1"]["images"] == {"test": 4}
    assert sum("no counterpart" in row.get("missing", "") for row in rows) == 2
    slow, fast = (measured[kind, "s_per_image"] for kind in ("diffusion-classifier", "diffc"))
    times = f"{slow['value'] / fast['value']:,.0f} times as fast (paper: 24 and 0.13 s, 185 times)"
    page = (tmp_path / "mini-fixed/table5.md").read_text()
    assert f"- diffc, {fast['value']:.3g} seconds: {times}" in page
    figure = reproduce(
        "figure7", replace(config, backbones=(f"sd-2.1={config.backbones[0]}",)), sizes=TINY
    )
    (row,) = figure.result["rows"]
    assert (figure.path.parent / row["gallery"]).is_file() and row["paper"] == 9.67
    (maps,) = reproduce("figure10", config, sizes=TINY).result["rows"]
    assert len(maps["shows"]) == 4 and all(0 < share <= 1 for share in maps["shows"].values())
    assert (tmp_path / "mini-fixed" / maps["sheet"]).stat().st_size > 0
    assert f"({maps['sheet']})" in (tmp_path / "mini-fixed/figure10.md").read_text()


def test_a_model_on_pixels_has_no_latents_to_cache(made: ReproduceConfig, tmp_path: Path) -> None:
    config = replace(made, backbones=(f"if-i-l={tiny_if(tmp_path / 'tiny-if')}",), seeds=1)
    rows = [one for one in our_rows(item("figure8").rows, config) if one.row.model == "if-i-l"]
    shared = Shared(config, TINY, tmp_path / "out", rows, silent)
    store = ActivationStore.open(shared.store(rows[0], "test"))
    assert len(store) == 12 and store.manifest["layer"] == "bottleneck"
    made_of = tmp_path / "out/sets" / rows[0].set_name / "test"
    assert [path.name for path in made_of.iterdir()] == ["none"]


def test_scores_of_llava_bench_stand_beside_the_papers(tmp_path: Path) -> None:
    """Three trainings of each model, far apart: the paper's ordering holds, or its reverse."""

    def file(name: str, relatives: list[float]) -> str:
        entry = [{"scores": {"all": {"relative": one, "relative_interval": [one - 4, one + 4],
                 "questions": 60}}} for one in relatives]  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({"files": entry}))
        return f"{name}={tmp_path / name}.json"

    near = [0.0, 0.5, -0.5]
    scores = {"clip": 50.0, "clip-dinov2": 30.0, "clip-sd-t25": 70.0}
    given = tuple(file(name, [one + gap for gap in near]) for name, one in scores.items())
    config = ReproduceConfig(out=tmp_path / "out", scores=given)
    made = reproduce("table4", config)
    found = {row["model"]: row for row in made.result["rows"] if row["metric"] == "relative"
             and row["dataset"].endswith(":all") and "value" in row}  # fmt: skip
    assert sorted(row["value"] for row in found.values()) == sorted(scores.values())
    assert [one["verdict"] for one in made.result["orderings"]] == ["holds", "holds"]
    assert "LLaVA extension" in made.path.read_text() and made.path.with_suffix(".svg").is_file()
    other = file("clip", [90.0, 90.5, 89.5])
    found = reproduce("table4", replace(config, scores=(other, *given[1:]))).result["orderings"]
    assert [one["verdict"] for one in found] == ["does not hold", "holds"]
    once = tuple(file(name, [one]) for name, one in scores.items())
    found = reproduce("table4", replace(config, scores=once)).result["orderings"]
    assert [one["verdict"] for one in found] == ["not settled", "not settled"]
    bare = reproduce("table4", replace(config, scores=())).result
    assert all("give what LLaVA-Bench said" in row["missing"] for row in bare["rows"])
    with pytest.raises(ValueError, match="'gpt', which is no model of the table: clip"):
        reproduce("table4", replace(config, scores=(f"gpt={tmp_path}/clip.json",)))
    # What is no number with an interval of two is no score.
    odd = [{"relative": 5.0, "relative_interval": one} for one in (["a", "b"], [1.0], 3, None)]
    odd += [{"relative": one, "relative_interval": [1.0, 2.0]} for one in ("x", True, [1], 1e300)]
    for entry in odd:
        (tmp_path / "clip.json").write_text(json.dumps({"files": [{"scores": {"all": entry}}]}))
        config = ReproduceConfig(out=tmp_path / "odd", scores=given[:1])
        assert all("missing" in row for row in reproduce("table4", config).result["rows"])
    (tmp_path / "clip.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"clip.json holds no scores: give the JSON that `revelio llava-bench"
    ):
        reproduce("table4", replace(config, scores=given[:1]))


def test_shifts_are_what_leaving_images_out_changes(made: ReproduceConfig, tmp_path: Path) -> None:
    right = np.random.default_rng(5).random((2, 400)) < np.array([[0.8], [0.6]])
    shared = Shared(made, TINY, tmp_path, [], silent)
    found = pipeline._accuracy(shared, right, [0.0, 1.0])
    subsets = image_subsets(400, made.seed).numpy()
    for row, value, shifts in zip(right, found["values"], found["shifts"], strict=True):
        assert value == pytest.approx(100 * row.mean())
        for subset, shift in zip(subsets, shifts, strict=True):
            left = [float(one) for one, kept in zip(row, subset, strict=True) if kept]
            assert shift == pytest.approx(100 * 3**0.5 * (np.mean(left) - row.mean()))
        # As large as what another 400 images would change.
        error = 100 * (row.mean() * (1 - row.mean()) / 400) ** 0.5
        assert np.std(shifts) == pytest.approx(error, rel=0.3)


@pytest.mark.parametrize(("mode", "name"), [("as_code", "table2c"), ("as_paper", "table9")])
def test_other_modes(
    made: ReproduceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, name: str
) -> None:
    one_row = replace(item(name), rows=item(name).rows[:1], orderings=())
    monkeypatch.setattr("revelio.pipelines.reproduce.item", lambda _: one_row)
    few = replace(made.data, limit=36)
    config = replace(made, out=tmp_path, seeds=1, data=few, mode=mode)  # type: ignore[arg-type]
    first = reproduce(name, config, sizes=TINY).result["rows"][0]
    assert first["value"] >= 0 and not list(tmp_path.glob("*/sets/*/*/none"))
    run = next(tmp_path.glob("*/rows/*/*/**/config.yaml")).read_text()
    assert f"mode: {mode}" in run


def test_a_row_of_other_pictures_under_the_same_names_is_not_taken(
    made: ReproduceConfig, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(made.data.source, tmp_path / "images"))
    config = replace(made, out=tmp_path / "out", seeds=1, data=DataConfig(source=str(images)))
    first = reproduce("table2a", config, sizes=TINY).result["rows"]
    made_of = [number for number, row in enumerate(first) if "value" in row]
    assert made_of
    for path in images.rglob("*.png"):
        with Image.open(path) as picture:
            ImageOps.invert(picture.convert("RGB")).save(path)
    page = (tmp_path / "out/mini-fixed/table2a.md").read_text()
    with pytest.raises(ValueError, match=r"no row can run.*other pictures"):
        reproduce("table2a", config, sizes=TINY)
    assert (tmp_path / "out/mini-fixed/table2a.md").read_text() == page


def test_a_killed_table_goes_on_with_the_next_row(
    made: ReproduceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, done, train = replace(made, out=tmp_path, seeds=1), [], pipeline.train_sae
    fits = {"bottleneck", "up_ft0"}

    def killed(given, progress):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given.store[0].name)
        return train(given, progress)

    monkeypatch.setattr(pipeline, "train_sae", killed)
    with pytest.raises(KeyboardInterrupt):
        reproduce("table2a", config, sizes=TINY)
    monkeypatch.setattr(
        pipeline, "train_sae", lambda *a: done.append(a[0].store[0].name) or train(*a)
    )
    found = reproduce("table2a", config, sizes=TINY).result
    assert len(done) == len(set(done)) == 4 and {name.split("-")[0] for name in done} > fits
    again = reproduce("table2a", config, sizes=TINY).result
    assert again == found and len(done) == 4


def test_a_row_that_can_not_run_is_named_with_what_it_lacks(
    made: ReproduceConfig, tmp_path: Path
) -> None:
    config = replace(made, out=tmp_path, seeds=1, data=DataConfig(source=str(tmp_path / "none")))
    table = reproduce("table2c", config, sizes=TINY)
    first, second = table.result["rows"]
    assert str(tmp_path / "none") in first["missing"] and "sd-2.1" in second["missing"]
    assert (
        first["missing"] in table.path.read_text() and second["missing"] in table.path.read_text()
    )
    assert table.result["orderings"][0]["verdict"] == "not judged"


def test_pictures_that_no_row_can_take_are_one_line_and_a_rerun_goes_on(
    made: ReproduceConfig, tmp_path: Path
) -> None:
    flat, pair = tmp_path / "flat", tmp_path / "pair"
    flat.mkdir()
    for number, path in enumerate(sorted(Path(made.data.source).rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
        folder = pair / ("few" if number < 2 else path.parent.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(path.read_bytes())
    config = replace(made, out=tmp_path / "out", seeds=1, data=DataConfig(source=str(flat)))
    first = reproduce("table2c", config, sizes=TINY).result["rows"][0]
    assert "flat has no labels: rows of the paper need class folders" in first["missing"]
    # A class of two images: one trains, one tests.
    again = replace(config, data=DataConfig(source=str(pair)))
    rows = reproduce("table9", again, sizes=TINY).result["rows"]
    assert rows[0]["images"] == {"train": 47, "validation": 0, "test": 13} and rows[0]["value"] >= 0


@pytest.mark.parametrize("scale", ["full", "mini"])
@pytest.mark.parametrize("name", items())
def test_the_plan_of_every_item(
    name: str, scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["reproduce", name, "--plan", "--scale", scale, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    rows = our_rows(item(name).rows, ReproduceConfig(scale=scale))
    missing = 0 if item(name).commands else sum(bool(one.missing) for one in rows)
    assert said.count("missing:") == missing
    lines = [line for line in said.splitlines() if line.startswith("  ")]
    assert len(set(lines)) == len(lines) == (len(item(name).commands) or len(rows))
    assert ("plan: no row can run" in said) == (0 < len(rows) == missing)
    assert all(command in said for command in item(name).commands)


def test_the_list_and_an_unknown_item(capsys: pytest.CaptureFixture[str]) -> None:
    main(["reproduce", "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(items())
    line = fails(capsys, "reproduce", "table12")
    assert "table12" in line and "table2a" in line and "figure10" in line


if __name__ == "__main__":  # one of the processes that test_two_processes_find_what_one_does starts
    out, model, images = sys.argv[1:]
    data = DataConfig(source=images)
    config = ReproduceConfig(
        out=Path(out), backbones=(model,), data=data, scale="mini", seeds=2, device="cpu"
    )
    reproduce("table2a", config, sizes=TINY)


@pytest.mark.parametrize(
    ("model", "side"), [("mini-sd", 32), ("mini-sd-photo", 64), ("mini-dit", 32)]
)
def test_a_plan_counts_the_latents_that_a_shipped_model_makes(model: str, side: int) -> None:
    backbone = load_backbone(model, device="cpu")
    made = backbone.encode(torch.zeros(1, 3, side, side))
    channels, stride = latents_of(model)
    assert tuple(made.shape[1:]) == (channels, side // stride, side // stride)
    assert made.element_size() == LATENT_BYTES
