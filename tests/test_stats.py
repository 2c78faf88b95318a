"""Intervals: against SciPy's own and by simulation, in which the truth is known."""

import numpy as np
import pytest
from scipy import stats

from revelio.stats import (
    Difference,
    holm,
    mean95,
    paired,
    proportion,
    t95,
    t_quantile,
    told_apart,
    trainings95,
    wilson95,
)


@pytest.mark.parametrize(("right", "of"), [(0, 10), (10, 10), (3, 10), (887, 1000)])
def test_wilson_is_the_formula(right: int, of: int) -> None:
    share, z = right / of, 1.959964
    middle = (share + z**2 / (2 * of)) / (1 + z**2 / of)
    half = z / (1 + z**2 / of) * np.sqrt(share * (1 - share) / of + z**2 / (4 * of**2))
    assert wilson95(right, of) == pytest.approx([middle - half, middle + half], abs=1e-6)
    # Newcombe (1998), table I.
    assert proportion(81, 263) == {"value": 0.308, "low": 0.2553, "high": 0.3662}


def test_t_is_in_the_tables() -> None:
    # Student's 97.5 % quantiles as printed in textbooks.
    for freedom, quantile in ((1, 12.706), (2, 4.303), (9, 2.262), (40, 2.021)):
        assert t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)
    values = [0.81, 0.84, 0.79, 0.83]
    half = 3.1824 * np.std(values, ddof=1) / 2
    assert mean95(values) == pytest.approx(
        [np.mean(values) - half, np.mean(values) + half], abs=1e-5
    )
    assert t95([0.8]) is None and t95([0.2, 0.99]) == [0.0, 1.0]


def test_one_training_has_the_test_images_part_only() -> None:
    assert trainings95([0.75], 40) == wilson95(30, 40)
    narrow, wide = trainings95([0.8, 0.8], 2000), trainings95([0.7, 0.9], 2000)
    assert narrow == pytest.approx([0.8 - 0.01753, 0.8 + 0.01753], abs=1e-4)  # as if of one sample
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def drawn(
    rng: np.random.Generator, easy: np.ndarray, trainings: int, by_chance: float, shift: float
) -> np.ndarray:
    """Which images some trainings get right: each has luck of its own, each image a difficulty of its own."""
    luck = rng.normal(shift, by_chance, (trainings, 1))
    return rng.random((trainings, len(easy))) < stats.norm.cdf(easy + luck)


def accuracy(by_chance: float, shift: float) -> float:
    """What trainings reach on average over all images that could be drawn: difficulties are N(1, 1)."""
    return float(stats.norm.cdf((1 + shift) / np.sqrt(2 + by_chance**2)))


@pytest.mark.parametrize("by_chance", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_intervals_cover_the_truth(by_chance: float, shift: float) -> None:
    """3 trainings, 300 images: paired, 95 % within 2 points and what 500 draws leave open; alone, or more."""
    rng, runs = np.random.default_rng(7), 500
    truth, other = accuracy(by_chance, shift), accuracy(by_chance, 0.0)
    inside = np.zeros(2)
    for _ in range(runs):
        easy = rng.normal(1, 1, 300)
        ours, theirs = (drawn(rng, easy, 3, by_chance, one) for one in (shift, 0.0))
        low, high = trainings95(list(ours.mean(1)), 300)
        inside[0] += low <= truth <= high
        low, high = paired(ours, theirs).interval
        inside[1] += low <= truth - other <= high
    alone, compared = inside / runs
    assert alone >= 0.93 - 0.02, alone
    assert 0.93 - 0.02 <= compared <= 0.97 + 0.02, compared


def test_trainings_that_agree_are_compared_image_by_image() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(200) < 0.7
    better = right | (rng.random(200) < 0.2)
    found = paired(np.stack([better] * 2), np.stack([right] * 2))
    # McNemar's setting: only the images in which the two differ count.
    gaps = better.astype(float) - right
    wanted = stats.ttest_rel(better.astype(float), right)
    assert found.value == pytest.approx(gaps.mean())
    assert found.p == pytest.approx(wanted.pvalue) and found.trainings == 2
    assert found.interval == pytest.approx(wanted.confidence_interval(), rel=1e-6)
    unpaired = trainings95([better.mean()] * 2, 200)
    assert found.interval[1] - found.interval[0] < unpaired[1] - unpaired[0]
    with pytest.raises(ValueError, match="same test images"):
        paired(better[None], right[None, :9])


def test_holm_is_the_published_procedure() -> None:
    # Reject while p_(i) < alpha / (m - i + 1), stop at the first that is not: by hand.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    rng = np.random.default_rng(3)
    for _ in range(50):
        values = rng.random(6) ** 4
        rejected = np.zeros(6, dtype=bool)
        for rank, one in enumerate(np.argsort(values)):
            if values[one] >= 0.05 / (6 - rank):
                break
            rejected[one] = True
        assert [p < 0.05 for p in holm(list(values))] == list(rejected)
    assert holm([]) == []


def test_a_winner_is_named_only_where_all_comparisons_together_support_it() -> None:
    def gap(value: float, p: float, trainings: int = 3) -> Difference:
        return Difference(value, (value - 0.1, value + 0.1), p, trainings)

    assert told_apart([gap(0.1, 0.04)]) == ["above"]
    assert told_apart([gap(0.1, 0.04), gap(0.1, 0.04)]) == ["not told apart from"] * 2
    assert told_apart([gap(0.1, 0.01), gap(-0.1, 0.001)]) == ["above", "below"]
    assert told_apart([gap(0.5, 1e-9, trainings=1)]) == ["one training: not compared with"]
    assert told_apart([gap(0.5, 0.9, trainings=1)]) == ["one training: not compared with"]
