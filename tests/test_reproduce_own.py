"""Reproducing on pictures of one's own: mistyped names and paths, and pictures that are broken."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_reproduce
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from test_reproduce import TINY

from revelio.activations.store import ActivationStore
from revelio.backbones.registry import describe_one
from revelio.data.config import DataConfig
from revelio.pipelines import silent
from revelio.pipelines.reproduce import reproduce
from revelio.pipelines.reproduce_parts import Shared
from revelio.pipelines.reproduce_plan import plan_item
from revelio.pipelines.reproduce_rows import measure
from revelio.reproduce.config import ReproduceConfig
from revelio.reproduce.items import item
from revelio.reproduce.rows import SIZES, our_rows

made = test_reproduce.made


def test_a_mistyped_path_or_name_replaces_nothing(made: ReproduceConfig, tmp_path: Path) -> None:
    config = replace(made, out=tmp_path / "out", seeds=1)
    first = reproduce("table2c", config, sizes=TINY)
    page = first.path.read_text()
    wrong = replace(config, data=DataConfig(source=str(tmp_path / "imagse")))
    with pytest.raises(
        ValueError, match=r"no row can run, and .*table2c.json of an earlier run stays"
    ):
        reproduce("table2c", wrong, sizes=TINY)
    assert first.path.read_text() == page
    for setting, given, near in (
        ("roots", f"caltech={tmp_path}", "no row has this data set: did you mean 'caltech101'?"),
        ("backbones", "sd-1.6=mini-sd", "no row has this model: did you mean 'sd-1.5'?"),
    ):
        mistyped = replace(config, **{setting: (given,)})
        for run in (
            lambda c: reproduce("table2c", c, sizes=TINY),
            lambda c: plan_item("table2c", c),
        ):
            with pytest.raises(ValueError) as refused:
                run(mistyped)
            assert near.replace("'", "") in str(refused.value).replace("'", "")
    # Those of other items are no mistakes: one command line serves all.
    plan_item("table2c", replace(config, roots=(f"caltech101={tmp_path}",)))


def test_a_broken_picture_is_left_out_of_classifiers_and_times_where_it_is_to_be_skipped(
    made: ReproduceConfig, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(made.data.source, tmp_path / "images"))
    data = DataConfig(source=str(images), on_error="skip")
    config = replace(made, out=tmp_path / "out", seeds=1, data=data)
    wanted = {("clip", "top1"), ("diffusion-classifier", "top1"), ("linear", "s_per_image")}
    rows = [
        one
        for one in our_rows(item("table5").rows, config)
        if (one.row.kind, one.row.metric) in wanted and not one.missing
    ]
    shared = Shared(config, TINY, config.out, rows, silent)
    test = shared.images(rows[0])[1]
    (images / test.ids[0]).write_bytes(b"no picture")
    for one in rows:
        found = measure(shared, one)
        assert found["images"]["test"] == len(test) - 1
    texts = shared._texts("from_clip", test, True)["from_clip"](range(len(test)))
    assert texts[0] == "" and all(texts[1:])
    stops = replace(config, data=replace(data, on_error="stop"))
    for one in rows:
        asked = replace(one, data=stops.data)
        with pytest.raises(ValueError, match="can't be read"):
            measure(Shared(stops, TINY, tmp_path / "stops", [asked], silent), asked)


def test_models_and_pictures_of_folders_called_alike_are_kept_apart(
    made: ReproduceConfig, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    model = Path(shutil.copytree(made.backbones[0], other / Path(made.backbones[0]).name))
    images = Path(shutil.copytree(made.data.source, other / Path(made.data.source).name))
    weights = next((model / "unet").glob("*.safetensors"))
    save_file({name: 1.5 * one for name, one in load_file(weights).items()}, weights)
    for path in images.rglob("*.png"):
        with Image.open(path) as picture:
            ImageOps.invert(picture.convert("RGB")).save(path)

    def rows(config: ReproduceConfig, root: Path) -> torch.Tensor:
        ours = our_rows(item("table2c").rows, config)[:1]
        return ActivationStore.open(
            Shared(config, TINY, root, ours, silent).store(ours[0], "train")
        ).tensor()

    pictures = replace(made, data=DataConfig(source=str(images)))
    configs = [made, replace(made, backbones=(str(model),)), pictures]
    together = [rows(config, tmp_path / "one") for config in configs]
    alone = [rows(config, tmp_path / str(place)) for place, config in enumerate(configs)]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert not any(torch.equal(together[0], one) for one in together[1:])


def test_known_names_stay_in_the_names_of_folders_and_a_folder_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(**settings: Any) -> list[str]:
        config = ReproduceConfig(scale="mini", **settings)
        return [one.set_name for one in our_rows(item("table2c").rows, config)]

    assert names()[0] == "mini-sd-samples"
    first, second = names(backbones=("a/model", "sd-2.1=b/model"))
    assert first != second and all(name.startswith("model-") for name in (first, second))
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    found = {
        names(data=DataConfig(source=source))[0]
        for source in ("pictures", "./pictures", str(tmp_path / "pictures"))
    }
    assert len(found) == 1


def broken(made: ReproduceConfig, root: Path) -> dict[str, ReproduceConfig]:
    """Settings that no row can run with, each for one reason."""
    (root / "empty").mkdir()
    (root / "flat").mkdir()
    shutil.copy(next(Path(made.data.source).rglob("*.png")), root / "flat" / "1.png")
    models = {"gone": str(root / "none"), "unknown": "mini-sdd", "no model": str(root / "empty")}
    sources = {"missing": str(root / "none"), "no name": "petss", "no labels": str(root / "flat")}
    no_copy = {"data": ReproduceConfig().data, "roots": (f"samples={root / 'none'}",)}
    return {
        **{name: replace(made, backbones=(one,)) for name, one in models.items()},
        **{name: replace(made, data=DataConfig(source=one)) for name, one in sources.items()},
        "no copy": replace(made, **no_copy),
    }


def test_a_plan_lists_what_is_lacking_as_the_run_does(
    made: ReproduceConfig, tmp_path: Path
) -> None:
    for name, config in broken(made, tmp_path).items():
        rows = reproduce("table2c", replace(config, out=tmp_path / name), sizes=TINY).result["rows"]
        plan = plan_item("table2c", config)
        assert [line.partition(": missing: ")[2] for line in plan.lines[1:]] == [
            row["missing"] for row in rows
        ], name
        assert plan.runs == 0 and plan.text().endswith("plan: no row can run")
    flat = replace(made, data=DataConfig(source=str(tmp_path / "flat")))
    assert plan_item("figure10", flat).runs == 1  # pictures that are only shown need no labels
    lines = plan_item("table7", replace(made, clip="mini-clap")).lines[1:]
    lacking = [line for line in lines if "missing: unknown backbone 'mini-clap'" in line]
    assert lacking == [line for line in lines if "from_clip" in line] != []


def test_a_plan_counts_the_pictures_of_a_folder(made: ReproduceConfig) -> None:
    plan = plan_item("table2c", made)
    d = describe_one(made.backbones[0]).layers["up_ft1"].channels
    n = SIZES["mini"].sae.expansion * d
    assert plan.lines[1].endswith(made.data.source)
    saes = made.seeds * 4 * (2 * n + 1) * d
    assert plan.bytes - saes == 4 * d * 48  # of 60 pictures, a fifth is held out
