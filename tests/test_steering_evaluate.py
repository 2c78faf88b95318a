"""The measures against counting by hand, and their intervals against the spread of repeated experiments."""

import numpy as np
import pytest
from PIL import Image

from revelio.steering.evaluate import (
    Drawn,
    as_pixels,
    difference_interval,
    mean_interval,
    measured,
    ratio_interval,
)
from revelio.steering.judges import open_judge


def drawn(seen: list[list[str]], shade: float = 0.0) -> Drawn:
    wanted = ["cat", "dog", "car"]
    return Drawn(wanted, seen, np.full((3, 2, 4, 4, 3), shade), 0.5)


def test_rates_are_counts():
    plain = drawn([["cat", "cat"], ["dog", "dog"], ["car", "dog"]])
    erased = drawn([["dog", "cat"], ["dog", "cat"], ["car", "car"]], shade=0.25)
    found = measured({"cat": erased}, {"cat": plain}, draws=200)
    assert found["target"]["value"] == 0.5
    assert found["target_relative"]["value"] == 0.5
    assert found["others"]["value"] == 0.75
    assert found["survival"]["value"] == 0.75 / 0.75
    assert found["turned_into"]["value"] == 0.25
    assert found["distance"] == {"value": 0.25, "low": 0.25, "high": 0.25}


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


def see(pictures: list[Image.Image]) -> list[str]:
    return ["dark" if np.asarray(one).mean() < 128 else "light" for one in pictures]


def test_a_judge_may_be_a_function_of_the_users():
    judge = open_judge(f"{__name__}:see", ["dark", "light"], "a {}")
    pictures = [Image.new("L", (4, 4), shade) for shade in (0, 255)]
    assert list(judge(pictures)) == ["dark", "light"]
    assert as_pixels(pictures).shape == (2, 4, 4, 3)
    for name in ("no_such_module:see", f"{__name__}:nothing"):
        with pytest.raises(ValueError, match="no judge at"):
            open_judge(name, ["dark"], "a {}")
    with pytest.raises(ValueError, match=r"has no \{\} where the class goes"):
        open_judge("clip-vit-b-32", ["dark"], "a photo")
