import io
import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from revelio.diffc.measures import DARK, confusion, confusion_png, measure, over_seeds
from revelio.stats import t95, t_quantile, wilson95


@pytest.mark.parametrize(("correct", "images"), [(0, 10), (10, 10), (3, 10), (887, 1000)])
def test_wilson_is_scipys(correct: int, images: int) -> None:
    theirs = stats.binomtest(correct, images).proportion_ci(0.95, method="wilson")
    assert wilson95(correct, images) == pytest.approx([theirs.low, theirs.high], abs=1e-9)


def test_t_interval_is_scipys() -> None:
    values = [0.81, 0.84, 0.79, 0.83]
    theirs = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert t95(values) == pytest.approx(list(theirs))
    assert t95([0.8]) is None
    for freedom in (1, 2, 9, 40):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-7)
    assert over_seeds(values)["mean"] == pytest.approx(statistics.mean(values))


def test_measures_are_scikit_learns() -> None:
    stream = np.random.default_rng(0)
    labels, found = stream.integers(0, 4, 200), stream.integers(0, 5, 200)
    counts = confusion(torch.tensor(labels), torch.tensor(found), 5)
    assert counts.tolist() == confusion_matrix(labels, found, labels=range(5)).tolist()
    result = measure(torch.tensor(labels), torch.tensor(found), list("abcde"))
    assert result["top1"] == pytest.approx((labels == found).mean())
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        theirs = balanced_accuracy_score(labels, found)
    assert result["class_mean"] == pytest.approx(theirs)
    # A class without test images has no accuracy.
    assert [row["name"] for row in result["per_class"]] == list("abcd")
    assert result["per_class"][2]["images"] == (labels == 2).sum()


def test_picture_shades_rows_by_share() -> None:
    counts = torch.tensor([[9, 0, 0], [0, 0, 4], [1, 0, 1]])
    image = Image.open(io.BytesIO(confusion_png(counts, ["cat", "dog", "a long name"])))
    pixels = np.asarray(image.convert("RGB"))
    dark = (pixels == np.array(DARK)).all(axis=2)
    rows, columns = np.nonzero(dark)
    # Two cells hold their whole row: (cat, cat) and (dog, a long name).
    assert dark.sum() > 1000
    margin = columns.min() - 1
    assert (rows.min() - margin) // 48 == 0
    cells = {((r - margin) // 48, (c - margin) // 48) for r, c in zip(rows, columns, strict=True)}
    assert cells == {(0, 0), (1, 2)}


def test_picture_of_many_classes() -> None:
    image = Image.open(io.BytesIO(confusion_png(torch.eye(102).long(), list(map(str, range(102))))))
    assert image.width < 900
