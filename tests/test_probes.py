"""Probes against scikit-learn, brute force, CLIPModel's own logits and planted classes."""

import numpy as np
import pytest
import torch
from backbones_helpers import picture, seeing_clip
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from revelio.backbones.prompts import class_texts
from revelio.backbones.registry import load_backbone
from revelio.data.dataset import ImageDataset
from revelio.probes.clip_zero_shot import clip_zero_shot
from revelio.probes.knn import knn_probe
from revelio.probes.linear import STRENGTHS, linear_probe
from revelio.probes.networks import AttentionPool, network_probe, resnet
from revelio.probes.score import score
from revelio.probes.split import draw, validation_part

LABELS = np.arange(120) % 3
TEST_LABELS = np.arange(90) % 3


def blobs(labels, seed, signal=2.0, width=6):
    drawn = np.random.default_rng(seed)
    return np.eye(3, width)[labels] * signal + drawn.normal(size=(len(labels), width))


def test_a_score_has_wilsons_interval():
    found = score([0, 1, 1, 2], [0, 1, 2, 2], seconds=8.0)
    expected = binomtest(3, 4).proportion_ci(method="wilson")
    assert (found.value, found.images, found.seconds) == (0.75, 4, 2.0)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="2 predictions and 1 label"):
        score([0, 1], [0], 1.0)


def test_every_class_is_split_alike():
    labels = np.repeat([4, 7, 9], [10, 2, 31])
    fitted, held = validation_part(labels, 0.2, seed=1)
    assert sorted([*fitted, *held]) == list(range(43))
    assert {c: int((labels[held] == c).sum()) for c in (4, 7, 9)} == {4: 2, 7: 1, 9: 6}
    assert not np.array_equal(held, validation_part(labels, 0.2, seed=2)[1])
    with pytest.raises(ValueError, match="class 7 has 2 images, 3 are needed"):
        draw(labels, 2, 0)
    with pytest.raises(ValueError, match="class 1 has 1 image"):
        validation_part(np.array([0, 0, 1]), 0.2, 0)


def test_the_linear_probe_is_scikit_learns_with_the_best_penalty():
    train, test = blobs(LABELS, 0) * [1, 50, 1, 1, 9, 1] + 3, None
    test = blobs(TEST_LABELS, 1) * [1, 50, 1, 1, 9, 1] + 3
    found = linear_probe(train, LABELS, test, TEST_LABELS, seed=3)

    def fitted(rows, labels, strength, others):
        mean, spread = rows.mean(0), rows.std(0)
        model = LogisticRegression(C=strength, max_iter=5000)
        return model.fit((rows - mean) / spread, labels).predict((others - mean) / spread)

    known, held = validation_part(LABELS, 0.2, 3)
    expected = {
        strength: (
            fitted(train[known], LABELS[known], strength, train[held]) == LABELS[held]
        ).mean()
        for strength in STRENGTHS
    }
    assert found.by_setting == pytest.approx(expected)
    assert found.by_setting[found.setting] == max(expected.values())
    assert found.predicted == fitted(train, LABELS, found.setting, test).tolist()
    assert found.score.value == np.mean(np.array(found.predicted) == TEST_LABELS) > 0.7


def test_the_nearest_neighbors_are_brute_forces():
    train, test = blobs(LABELS, 0), blobs(TEST_LABELS, 1)
    found = knn_probe(train, LABELS, test, TEST_LABELS, neighbors=(7, 1000))
    assert set(found.by_setting) == {7, 1000} and found.setting == 7
    unit, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, test))
    for row, predicted in zip(other, found.predicted, strict=True):
        nearest = np.argsort(-(unit @ row))[:7]
        assert predicted == np.bincount(LABELS[nearest]).argmax()
    assert found.score.value > 0.6


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_probes_find_nothing_in_noise(probe):
    train, test = blobs(LABELS, 0, signal=0.0), blobs(TEST_LABELS, 1, signal=0.0)
    found = probe(train, LABELS, test, TEST_LABELS).score
    assert found.low < 1 / 3 < found.high


def test_attention_is_pooled_as_written_out():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AttentionPool(64, 5)
    assert model.attention.num_heads == 2  # of at least 32 channels
    assert AttentionPool(40, 5).attention.num_heads == 1
    grid = torch.randn(2, 64, 3, 4, generator=torch.Generator().manual_seed(1))
    tokens = nn.functional.layer_norm(grid.permute(0, 2, 3, 1).reshape(2, 12, 64), (64,))
    weight, bias = model.attention.in_proj_weight, model.attention.in_proj_bias
    q, k, v = (
        (rows @ w.T + b).unflatten(-1, (2, 32)).transpose(1, 2)
        for rows, w, b in zip(
            (model.query.expand(2, -1, -1), tokens, tokens),
            weight.chunk(3),
            bias.chunk(3),
            strict=True,
        )
    )
    pooled = ((q @ k.mT / 32**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = model.head(model.attention.out_proj(pooled)[:, 0])
    torch.testing.assert_close(model(grid), expected, atol=1e-5, rtol=1e-4)


def scenes(labels, seed):
    """Grids with a cell of each class; a fourth channel marks the one that counts, which no mean tells."""
    drawn = torch.Generator().manual_seed(seed)
    grids = torch.randn(len(labels), 16, 5, 5, generator=drawn)
    cells = torch.rand(len(labels), 25, generator=drawn).argsort(1)[:, :3]
    for row, (label, places) in enumerate(zip(labels, cells, strict=True)):
        for each, place in enumerate(places):
            grids[row, each].view(-1)[place] += 6
        grids[row, 3].view(-1)[places[label]] += 6
    return grids


def test_the_attention_probe_finds_one_cell_that_the_mean_hides():
    labels, others = np.arange(300) % 3, np.arange(150) % 3
    train, test = scenes(labels, 0), scenes(others, 1)
    found = network_probe("attention", train, labels, test, others, epochs=20)
    again = network_probe(
        "attention", train, labels, test, others, epochs=20, learning_rates=(1e-2,)
    )
    assert found.predicted == again.predicted and found.setting == 1e-2
    assert found.by_setting[found.setting] == max(found.by_setting.values())
    mean = linear_probe(train.mean((2, 3)).numpy(), labels, test.mean((2, 3)).numpy(), others)
    assert found.score.low > mean.score.high
    shuffled = np.random.default_rng(0).permutation(labels)
    control = network_probe("attention", train, shuffled, test, others, epochs=5)
    assert control.score.low < 1 / 3 < control.score.high
    with pytest.raises(ValueError, match="epochs is 0"):
        network_probe("attention", train, labels, test, others, epochs=0)


def test_the_resnet_probe_sees_the_order_of_cells_that_no_bag_of_cells_holds():
    labels, others = np.arange(240) % 2, np.arange(121) % 2
    train, test = (torch.zeros(len(some), 4, 6, 6) for some in (labels, others))
    for grids, some, seed in ((train, labels, 0), (test, others, 1)):
        drawn = np.random.default_rng(seed)
        for row, label in enumerate(some):
            for y, x in zip(range(0, 6, 2), drawn.integers(5, size=3), strict=True):
                grids[row, 1 - label, y, x] = grids[row, label, y, x + 1] = (
                    5  # left of the other, or right
                )
        grids += torch.from_numpy(0.3 * drawn.normal(size=grids.shape))
    found, bag = (
        network_probe(name, train, labels, test, others, epochs=5, learning_rates=(1e-3,))
        for name in ("resnet", "attention")
    )
    assert found.score.low > 0.9 and bag.score.low < 0.5 < bag.score.high
    # A leftover batch of one image is passed over; a grid of one cell goes through.
    assert resnet(4, 3)(torch.randn(2, 4, 1, 1)).shape == (2, 3)
    small = network_probe(
        "resnet", train[:, :, :1, :1], labels, test, others, epochs=1, batch_size=63
    )
    assert 0 <= small.score.value <= 1


CLASSES = ("golden_retriever", "cat", "Boeing 747")
TEMPLATES = ("a photo of a {}", "{} in the wild")


def test_clip_sees_the_class_of_its_own_logits(tmp_path):
    folder = str(seeing_clip(tmp_path))
    model, tokenizer = (
        CLIPModel.from_pretrained(folder).eval(),
        CLIPTokenizer.from_pretrained(folder),
    )
    images = ImageDataset("pets", None, CLASSES, [str(i) for i in range(9)], [0, 1, 2] * 3, picture)
    transform = load_backbone(folder, device="cpu").transform
    pixels = torch.stack([transform(picture(i)) for i in range(9)])
    for templates in (TEMPLATES[:1], TEMPLATES):
        similar = []
        with torch.no_grad():
            for texts in zip(*(class_texts(images, t) for t in templates), strict=True):
                rows = []
                for text in texts:
                    tokens = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
                    output = model(pixel_values=pixels, **tokens)
                    rows.append(output.text_embeds[0])
                mean = torch.stack(rows).mean(0)
                similar.append(output.image_embeds @ (mean / mean.norm()))
        expected = torch.stack(similar, 1).argmax(1).tolist()
        found = clip_zero_shot(images, clip=folder, templates=templates, device="cpu", batch_size=4)
        assert found.predicted == expected and len(set(expected)) > 1
        assert found.score.value == np.mean(np.array(expected) == [0, 1, 2] * 3)
    with pytest.raises(ValueError, match="has no labels"):
        clip_zero_shot(ImageDataset("x", None, (), ["a"], None, picture), clip=folder)
