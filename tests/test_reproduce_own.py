"""Reproducing on pictures of one's own: mistyped names and paths, and pictures that are broken."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import test_reproduce
from test_reproduce import TINY

from revelio.data.config import DataConfig
from revelio.pipelines import silent
from revelio.pipelines.reproduce import reproduce
from revelio.pipelines.reproduce_parts import Shared
from revelio.pipelines.reproduce_plan import plan_item
from revelio.pipelines.reproduce_rows import measure
from revelio.reproduce.config import ReproduceConfig
from revelio.reproduce.items import item
from revelio.reproduce.rows import our_rows

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
