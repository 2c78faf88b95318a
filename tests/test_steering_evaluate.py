"""The measures against counting by hand, and their intervals against the spread of repeated experiments."""

from dataclasses import replace

import numpy as np

from revelio.steering.evaluate import (
    Drawn,
    difference_interval,
    mean_interval,
    measured,
    ratio_interval,
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
