"""Splicing by one gather against a loop over samples, on random batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX
from llava_ext.splice import expanded_length, splice

WIDTH = 3


@st.composite
def batches(draw):
    """Samples as lists of (id, label), tokens an image, sides of the padding before and after."""
    token = st.one_of(st.integers(0, 9), st.just(IMAGE_INDEX))
    samples = draw(st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=4))
    sides = st.sampled_from(["left", "right"])
    return samples, draw(st.integers(1, 5)), draw(sides), draw(sides), draw(st.integers(0, 2))


def padded(samples, side, extra, fill):
    row = max(map(len, samples)) + extra
    gaps = [[fill] * (row - len(sample)) for sample in samples]
    return torch.tensor(
        [g + s if side == "left" else s + g for s, g in zip(samples, gaps, strict=True)]
    )


def by_loop(samples, text: list[list[Tensor]], images: Tensor, side: str):
    """One sample after the other, one token after the other."""
    rows, labels, image = [], [], 0
    for sample, vectors in zip(samples, text, strict=True):
        row, label = [], []
        for index, vector in zip(sample, vectors, strict=True):
            if index == IMAGE_INDEX:
                row += list(images[image])
                label += [IGNORE_INDEX] * images.shape[1]
                image += 1
            else:
                row.append(vector)
                label.append(index + 100)
        rows.append(row)
        labels.append(label)
    length = max(map(len, rows))
    found = []
    for row, label in zip(rows, labels, strict=True):
        gap = length - len(row)
        zeros, ones = [torch.zeros(WIDTH)] * gap, [1] * len(row)
        places = list(range(len(row)))
        found.append(
            (zeros + row, [0] * gap + ones, [IGNORE_INDEX] * gap + label, [0] * gap + places)
            if side == "left"
            else (row + zeros, ones + [0] * gap, label + [IGNORE_INDEX] * gap, places + [0] * gap)
        )
    embeddings, masks, labels, positions = zip(*found, strict=True)
    return torch.stack([torch.stack(row) for row in embeddings]), masks, labels, positions


@settings(max_examples=200, deadline=None)
@given(batches())
def test_splice_is_the_loop_over_samples(batch):
    samples, size, before, after, extra = batch
    ids = padded(samples, before, extra, 7)
    mask = padded([[1] * len(sample) for sample in samples], before, extra, 0)
    # What labels say at images and padding must not matter.
    labels = padded([[index + 100 for index in sample] for sample in samples], before, extra, 5)
    text = torch.randn(*ids.shape, WIDTH)
    count = sum(sample.count(IMAGE_INDEX) for sample in samples)
    images = torch.randn(count, size, WIDTH)
    vectors = [list(row[kept.bool()]) for row, kept in zip(text, mask, strict=True)]
    wanted, masks, wanted_labels, positions = by_loop(samples, vectors, images, after)
    for length in (None, wanted.shape[1]):
        found = splice(ids, mask, labels, text, images, after, length)
        assert torch.equal(found.embeddings, wanted)
        assert found.attention_mask.tolist() == [list(row) for row in masks]
        assert found.labels is not None
        assert found.labels.tolist() == [list(row) for row in wanted_labels]
        assert found.position_ids.tolist() == [list(row) for row in positions]
    lengths = [expanded_length(sample, size) for sample in samples]
    assert max(lengths) == wanted.shape[1] and lengths == [sum(row) for row in masks]


def test_a_placeholder_in_the_padding_is_no_image():
    ids = torch.tensor([[1, IMAGE_INDEX]])
    found = splice(
        ids, torch.tensor([[1, 0]]), None, torch.ones(1, 2, WIDTH), torch.zeros(0, 4, WIDTH)
    )
    assert found.embeddings.shape == (1, 1, WIDTH) and found.labels is None


def test_gradients_reach_exactly_what_is_used():
    ids = torch.tensor([[4, IMAGE_INDEX, 5]])
    text, images = torch.randn(1, 3, WIDTH), torch.randn(1, 2, WIDTH)
    text.requires_grad_(True)
    images.requires_grad_(True)
    splice(ids, torch.ones_like(ids), None, text, images).embeddings.mul(2.0).sum().backward()
    assert text.grad is not None and images.grad is not None
    assert text.grad[0, :, 0].tolist() == [2, 0, 2] and torch.all(images.grad == 2)


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_images_is_an_error(count):
    ids = torch.tensor([[4, IMAGE_INDEX]])
    with pytest.raises(ValueError, match=f"1 image placeholder but {count} images"):
        splice(
            ids, torch.ones_like(ids), None, torch.zeros(1, 2, WIDTH), torch.zeros(count, 4, WIDTH)
        )
