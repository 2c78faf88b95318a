from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from revelio.data.dataset import ImageDataset
from revelio.data.splits import stratified_split
from revelio.diffc.inputs import cut_test


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.floats(0.0, 0.9), st.integers(0, 5))
def test_disjoint_whole_and_stratified(labels: list[int], fraction: float, seed: int) -> None:
    kept, held = stratified_split(labels, fraction, seed, "x")
    assert sorted(kept + held) == list(range(len(labels)))
    shares = Counter(labels[i] for i in held)
    for label, count in Counter(labels).items():
        if fraction == 0 or count == 1:
            assert shares[label] == 0
        else:
            assert 1 <= shares[label] < count
            assert abs(shares[label] - fraction * count) <= 1


def test_keyed_by_seed() -> None:
    labels = [0] * 30 + [1] * 30
    assert stratified_split(labels, 0.2, 1) == stratified_split(labels, 0.2, 1)
    assert stratified_split(labels, 0.2, 1) != stratified_split(labels, 0.2, 2)
    assert [sum(labels[i] == c for i in stratified_split(labels, 0.2, 1)[1]) for c in (0, 1)] == [
        6,
        6,
    ]


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_impossible_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="can't hold out"):
        stratified_split([0, 1], fraction, 0)


@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_one_image_a_class_leaves_none_to_test_on(fraction: float) -> None:
    """No share helps, so none is advised; one class of two images is enough."""
    classes, picture = ("x", "y", "z"), Image.new("RGB", (1, 1))
    dataset = ImageDataset("owls", None, classes, list("abc"), [0, 1, 2], lambda _: picture)
    with pytest.raises(ValueError, match="owls has one image a class"):
        cut_test(dataset, fraction, 0)
    kept, held = cut_test(replace(dataset, labels=[0, 1, 1]), fraction, 0)
    assert (len(kept), len(held)) == (2, 1)
