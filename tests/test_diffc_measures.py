import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from revelio.diffc.measures import CAPTION, DARK, confusion, confusion_png, measure


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
    dark = (pixels == np.array(ImageColor.getrgb(DARK))).all(axis=2)
    rows, columns = np.nonzero(dark)
    # Two cells hold their whole row: (cat, cat) and (dog, a long name).
    assert dark.sum() > 1000
    top, left = rows.min(), columns.min()
    cells = {((r - top) // 48, (c - left) // 48) for r, c in zip(rows, columns, strict=True)}
    assert cells == {(0, 0), (1, 2)}


def test_picture_of_many_classes() -> None:
    image = Image.open(io.BytesIO(confusion_png(torch.eye(102).long(), list(map(str, range(102))))))
    assert image.width < 900


def test_the_caption_of_a_confusion_picture_is_whole():
    """Its ink ends before the picture does, and is as wide for few classes as for many."""
    wide = []
    for classes in (2, 5, 30):
        names = [str(number) for number in range(classes)]
        image = Image.open(io.BytesIO(confusion_png(torch.eye(classes).long(), names))).convert("L")
        strip = image.crop((0, image.height - 28, image.width, image.height))
        left, _, right, _ = strip.point(lambda value: 255 * (value < 128)).getbbox()
        assert left >= 10 and right <= image.width - 10
        wide.append(right - left)
    assert wide == pytest.approx([wide[0]] * 3, abs=2) and wide[0] > 5 * len(CAPTION)
