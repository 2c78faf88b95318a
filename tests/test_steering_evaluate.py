"""The measures against counting by hand, and their intervals against the spread of repeated experiments."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from revelio.steering.draw import _fitting
from revelio.steering.evaluate import (
    Drawn,
    difference_interval,
    mean_interval,
    measured,
    ratio_interval,
    share_interval,
)


def drawn(seen: list[list[str]], shade: float = 0.0, targets: tuple[str, ...] = ("cat",)) -> Drawn:
    distances = {"pixels": np.full((3, 2), shade), "features": np.array([[9, 9], [0, 1], [2, 3.0]])}
    return Drawn(targets, ["cat", "dog", "car"], seen, distances, 0.5)


def test_rates_are_counts():
    plain = drawn([["cat", "cat"], ["dog", "dog"], ["car", "dog"]])
    erased = drawn([["dog", "cat"], ["dog", "cat"], ["car", "car"]], shade=0.25)
    found = measured([erased], [plain], draws=200)
    assert found["target"]["value"] == 0.5
    assert found["target_relative"]["value"] == 0.5
    assert found["others"]["value"] == 0.75
    assert found["survival"]["value"] == 0.75 / 0.75
    assert found["turned_into"]["value"] == 0.25
    assert found["distance"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert found["features_distance"]["value"] == 1.5  # of the dog's and the car's pictures


def test_several_targets_at_once_and_a_detector_instead_of_the_judge():
    seen = [["dog", "cat"], ["dog", "car"], ["car", "cat"]]
    both = drawn(seen, targets=("cat", "dog"))
    assert both.sees().tolist() == [[1, 1], [1, 0]]
    assert both.sees([1]).tolist() == [[1, 0]]
    assert both.keeps().tolist() == [[1, 0]]
    assert both.becomes().tolist() == [[0, 1]]
    detected = replace(drawn(seen), shows=np.array([[1, 1], [0, 1], [0, 0.0]]))
    assert detected.sees().tolist() == [[1, 1]]
    assert detected.becomes().tolist() == [[0, 1], [0, 0]]
    assert detected.keeps().tolist() == drawn(seen).keeps().tolist()


def test_several_targets_are_averaged_over_their_pictures():
    one = np.array([[1.0, 0.0]])
    two = np.array([[1.0, 1.0], [1.0, 1.0]])
    assert mean_interval([one, two], draws=50)["value"] == 5 / 6


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        rates = (random.random((12, 6)) < 0.3).astype(float)
        found = mean_interval([rates], seed=trial, draws=300)
        inside += found["low"] <= 0.3 <= found["high"]
    assert inside >= 85


def test_ratios_and_differences_are_paired():
    plain = (np.random.default_rng(1).random((10, 4)) < 0.7).astype(float)
    same = ratio_interval([plain], [plain], draws=100)
    assert same == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert difference_interval([plain], [plain], draws=100) == {"value": 0, "low": 0, "high": 0}
    half = plain * (np.arange(10) < 5)[:, None]
    found = difference_interval([half], [plain], draws=500)
    assert found["high"] < 0
    assert ratio_interval([half], [plain * 0], draws=10) is None


def test_pictures_that_all_agree_leave_room_for_those_not_drawn():
    """Of 3 prompts all may show the target, and yet a model may draw it in half of all pictures."""
    three, none = np.ones((3, 1)), np.zeros((3, 1))
    # Wilson (1927): z^2 / (n + z^2) is what 0 of n leaves open.
    room = 1.959964**2 / (3 + 1.959964**2)
    found = share_interval([three])
    assert (found["value"], found["high"]) == (1, 1)
    assert found["low"] == pytest.approx(1 - room, abs=1e-6)
    assert share_interval([none])["high"] == pytest.approx(room, abs=1e-6)
    # Seeds count where they are more than prompts, and experiments add up.
    assert share_interval([np.zeros((1, 3))]) == share_interval([none])
    assert share_interval([none, none])["high"] < share_interval([none])["high"]
    mixed = np.array([[1.0], [0], [1]])
    assert share_interval([mixed]) == mean_interval([mixed])
    # Erased altogether, or all as it was: the other pictures may still be otherwise.
    erased = ratio_interval([none], [three])
    assert erased and erased["high"] == pytest.approx(room, abs=1e-6)
    kept = ratio_interval([mixed.copy()], [mixed])
    assert kept and kept["value"] == 1
    assert kept["low"] == pytest.approx(max(0, 1 - room / (2 / 3)), abs=1e-6)
    assert kept["high"] == pytest.approx(1.5, abs=1e-6)  # no more than all pictures
    plain = drawn([["cat", "cat"], ["dog", "dog"], ["car", "dog"]])
    own = measured([plain], [plain], draws=10)
    assert own["survival"] == own["target_relative"] == {"value": 1, "low": 1, "high": 1}


def test_a_title_fits_its_column_and_keeps_its_strength():
    pen = ImageDraw.Draw(Image.new("RGB", (8, 8)))
    short = _fitting("difference of means -0.25", pen, 88)
    assert pen.textlength(short) <= 88 < pen.textlength("difference of means -0.25")
    assert short.startswith("diff") and short.endswith("... -0.25")
    assert _fitting("steered -0.5", pen, 88) == "steered -0.5"
