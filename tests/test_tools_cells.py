"""The page of the proof on cells: what did not hold comes first, and numbers are those of the JSON."""

from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_helpers import gallery_parts
from PIL import Image

from revelio.activations.store import write_store
from revelio.analysis.locality import firings, locality
from revelio.analysis.redundancy import partners, redundancy
from revelio.data.config import DataConfig
from revelio.evaluation.measures import MEASURES
from revelio.run_dir import read_json
from tools.cells import page
from tools.cells.report import _differences
from tools.cells.setting import ARMS, SETTINGS, Setting, Work


def over(values: list[float], verdict: str) -> dict:
    return {"value": float(np.mean(values)), "trainings": values, "verdict": verdict}


@pytest.fixture
def found(tmp_path) -> dict:
    """Results of one model: cells are purer than pooled, reconstruct worse, and do not beat k-means."""
    judged = {
        "pooled": {
            "over_trainings": {
                "fvu": over([0.10, 0.11, 0.12], "beats every control"),
                "purity": over([0.5, 0.51, 0.49], "beats every control"),
            }
        },
        "cells": {
            "over_trainings": {
                "fvu": over([0.20, 0.21, 0.22], "beats every control"),
                "purity": over([0.7, 0.72, 0.68], "not told apart from k-means"),
            }
        },
    }
    model, rows, top, _ = gallery_parts(tmp_path / "rows")
    grids = write_store(
        tmp_path / "s", rows.tensor()[:, :, None, None].repeat(1, 1, 2, 2), rows.ids
    )
    latents = torch.arange(8)
    part = {
        "locality": locality(firings(model, grids, latents)),
        "redundancy": redundancy(model, top),
        "partners": partners(model, model, latents),
        "latents": latents.tolist(),
    }
    case = {"layer": "up_ft1", "timestep": 25, "sigma": {"value": 1.5, "interval": [1.25, 1.75]}}
    claim = {
        "text": "t = 25 is purest",
        "verdict": "not settled",
        "probability": 0.4,
        "by_chance": 0.5,
    }
    orderings = {"cases": [case], "claims": [claim]}
    one = {
        "title": "mini-sd on Fashion-MNIST", "layer": "up_ft1", "timestep": 25, "images": [2000, 1000],
        "measures": {arm: judged[arm]["over_trainings"] for arm in ARMS},
        "controls": {
            arm: {"fvu": {"k-means": 0.5, "channels": 0.4}, "purity": {"k-means": 0.6, "channels": 0.3}}
            for arm in ARMS
        },
        "stability": {
            arm: {"k-SAE": {"0.7": {"value": 0.8}}, "channels": {"0.7": {"value": 1.0}}} for arm in ARMS
        },
        "cells_minus_pooled": _differences(judged),
        "locality": {arm: [part] for arm in ARMS},
        "orderings": {arm: orderings for arm in ARMS},
    }  # fmt: skip
    sizes = {"steps": 150, "batch": 1024, "expansion": 8, "k": 16, "seeds": [0, 1, 2]}
    return {"sizes": sizes, "settings": {"fashion": one}}


def test_the_page_says_first_where_cells_are_better_and_where_not(found):
    said = "\n".join(page.text(found))
    than_pooled, than_controls = said.split("\n| better than ")[1:3]
    assert than_controls.index("told apart from 1 of 2") < said.index("| measure |")
    head, _, *rows = than_pooled.strip().splitlines()
    assert head.endswith("| mini-sd on Fashion-MNIST |")
    assert rows == ["| fvu | **worse** |", "| purity | better |"]
    assert "| fvu | better than all |\n| purity | not told apart from 1 of 2 |" in than_controls
    reading = said.split("## ")[1]  # every measure and column is explained before the first table
    assert reading.startswith("How to read") and reading.index("verdict") > 0
    for name in (
        *MEASURES,
        "pooled",
        "cells",
        "its best control",
        "difference",
        "chance",
        "probability",
    ):
        assert name.split(" ")[0] in reading, name
    assert "153,600" in said and "docs" not in said.split("##")[0].replace("docs/results.md", "")
    # The best control is the lowest of what is better low, the highest of what is better high.
    assert "| fvu | 0.110 | 0.400 (channels) | 0.210 | 0.400 (channels) | +0.100 [" in said
    assert "| purity | 0.500 | 0.600 (k-means) | 0.700 | 0.600 (k-means) | +0.200 [" in said
    assert "| up_ft1, t = 25 | 1.50 (1.25 to 1.75) | 1.50 (1.25 to 1.75) |" in said
    assert "| t = 25 is purest | not settled | 0.40 | not settled | 0.40 | 0.50 |" in said
    entropy = found["settings"]["fashion"]["locality"]["cells"][0]["locality"]["spatial_entropy"]
    assert f"| Spatial entropy | {entropy['value']:.3f} (" in said


def test_masks_of_garments_are_their_class_where_they_are_not_ground(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(2):
        (folder / f"c{number}").mkdir(parents=True)
        grey = np.zeros((8, 8), np.uint8)
        grey[2:5, 3:6] = 200
        Image.fromarray(grey).save(folder / f"c{number}" / "x.png")
    setting = Setting("fashion", "", "mini-sd", "fashion-mnist", ("up_ft1",), "up_ft1")
    work = OfFolder(tmp_path / "work", {"fashion-mnist": folder})
    masks = work.masks(setting)
    assert masks is not None and work.masks(SETTINGS[0]) is None
    for number in range(2):
        with Image.open(masks / f"c{number}/x.png.png") as mask:
            seen = np.array(mask)
        assert (seen[2:5, 3:6] == number + 1).all() and seen.sum() == 9 * (number + 1)


class OfFolder(Work):
    """Takes the pictures of a folder for those of Fashion-MNIST."""

    def data(self, setting: Setting, part: str) -> DataConfig:
        """All of them, whatever the split."""
        return DataConfig(source=str(self.roots[setting.data]))


def test_controls_are_counted_by_the_verdict_that_names_them():
    beaten = over([0.5], "beaten by channels and independent axes")
    level = over([0.5], "not told apart from principal axes")
    names = ("channels", "principal axes", "independent axes")
    one = {
        "measures": {"cells": {"purity": beaten, "fvu": level, "entropy": over([0.1], page.BEATS)}},
        "controls": {
            "cells": {name: dict.fromkeys(names, 0.5) for name in ("purity", "fvu", "entropy")}
        },
    }
    said = {name: page._than_controls(one, name) for name in ("purity", "fvu", "entropy", "cosine")}
    assert said == {
        "purity": "**worse** than 2 of 3",
        "fvu": "not told apart from 1 of 3",
        "entropy": "better than all",
        "cosine": "not measured",
    }


def test_docs_cells_is_rendered_from_its_json():
    docs = Path(page.__file__).parents[2] / "docs"
    said = "\n".join(page.text(read_json(docs / "cells.json"))) + "\n"
    assert said == (docs / "cells.md").read_text(encoding="utf-8")
