"""The evaluation's photo sections and their page, on tiny data."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from revelio.mini.evaluate import SECTIONS, evaluate
from revelio.mini.page import PARTS, by_name_part, curve_part
from revelio.mini.report import Inputs
from revelio.mini.sections_photo import photographs, snapshots


def inputs(folder: Path, caltech: Path | None = None) -> Inputs:
    return Inputs(folder, folder, folder, None, caltech, 0)


def test_every_section_has_its_part_of_the_page() -> None:
    assert set(SECTIONS) == set(PARTS)


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown section 'nonsense'"):
        evaluate(inputs(tmp_path), ["nonsense"])


def test_the_smallest_class_bounds_the_labels(tmp_path: Path) -> None:
    for split, counts in (("train", {"ant": 5, "bee": 9}), ("test", {"ant": 2, "bee": 20})):
        names = [f"{kind}/{split}_{i}.jpg" for kind, n in counts.items() for i in range(n)]
        for name in names:
            path = tmp_path / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 24), "green").save(path)
        (tmp_path / f"{split}.txt").write_text("\n".join(names))
    pool, test, labelled = photographs(inputs(tmp_path, tmp_path), 16)
    assert labelled == 4  # one of ant's five is left to choose the probe's strength on
    assert (len(pool[0]), len(test[0])) == (14, 2 + 15)
    assert len(set(pool[1] + test[1])) == 14 + 17


def test_a_closed_set_is_called_one() -> None:
    entry = {"value": 0.5, "low": 0.4, "high": 0.6, "images": 9, "chance": 0.1}
    text = by_name_part({"fashion-mnist": entry, "caltech101": entry})
    assert "closed set, not zero-shot" in text
    assert "| caltech101 | 9 | 50.0 [40.0, 60.0] | 10.0 |" in text


def test_snapshots_come_in_order_and_a_run_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no snapshots"):
        list(snapshots(tmp_path))
    folder = tmp_path / "snapshots"
    folder.mkdir()
    for step in (20, 3):
        kept = {"weights": {"w": torch.full((2,), float(step))}, "step": step, "seconds": 30 * step}
        torch.save(kept, folder / f"step_{step:07d}.pt")
    found = list(snapshots(tmp_path))
    assert [(step, minutes, weights["w"].tolist()) for step, minutes, weights in found] == [
        (3, 1.5, [3.0, 3.0]),
        (20, 10.0, [20.0, 20.0]),
    ]


def test_snapshots_of_a_training_on_a_gpu_are_read_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snapshots").mkdir()
    file = tmp_path / "snapshots" / "step_0000002.pt"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"weights": {"w": torch.ones(2)}, "step": 2, "seconds": 60.0}, file)
    assert b"cuda:0" in file.read_bytes()
    ((step, minutes, weights),) = snapshots(tmp_path)
    assert (step, minutes) == (2, 1.0)
    assert weights["w"].device.type == "cpu" and torch.equal(weights["w"], torch.ones(2))


def test_the_curve_is_a_table_of_minutes_and_layers() -> None:
    cell = {"value": 0.125, "low": 0.1, "high": 0.15}
    figures = {
        "labelled_a_class": 20,
        "timestep": 100,
        "test": 1515,
        "curve": [
            {"step": step, "minutes": minutes, "probe": {"bottleneck": cell, "up_ft0": cell}}
            for step, minutes in ((493, 0.5), (1200, 4.0))
        ],
        "pixels": [{"side": 16, "probe": {"20": cell}}],
    }
    text = curve_part(figures)
    assert "| minutes of training (steps) | bottleneck % | up_ft0 % |" in text
    assert "| 0.5 (493) | 12.5 [10.0, 15.0] |" in text
    assert "| 4 (1,200) | 12.5 [10.0, 15.0] | 12.5 [10.0, 15.0] |" in text
    assert "Pixels at 16x16 reach 12.5 [10.0, 15.0] %" in text
