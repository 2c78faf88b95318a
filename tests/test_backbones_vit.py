"""CLIP and DINOv2 against transformers' own hidden states."""

import json

import pytest
import torch
from backbones_helpers import picture, tiny_clip, tiny_dinov2
from transformers import CLIPModel, Dinov2Model, Dinov2WithRegistersModel

from revelio.backbones.base import DiffusionModel, EmbeddingModel
from revelio.backbones.registry import load_backbone

IDS = ["a", "b"]
BLOCKS = ["block0", "block1", "block2"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    return tiny_dinov2(tmp_path_factory.mktemp("dinov2"))


def pictures(backbone):
    return backbone.encode(torch.stack([backbone.transform(picture(i)) for i in range(2)]))


def assert_patches(grid, tokens, side):
    """Patch i of the tokens stands at (i // side, i % side) of the grid."""
    assert grid.shape == (len(tokens), tokens.shape[2], side, side)
    for i in range(side * side):
        torch.testing.assert_close(
            grid[:, :, i // side, i % side], tokens[:, i], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("size", [32, 48])
def test_clip_blocks_are_its_hidden_states(clip_folder, size):
    backbone = load_backbone(str(clip_folder), image_size=size, device="cpu")
    pixels = pictures(backbone)
    model = CLIPModel.from_pretrained(clip_folder).vision_model.eval()
    with torch.no_grad():
        states = model(
            pixels, output_hidden_states=True, interpolate_pos_encoding=size != 32
        ).hidden_states
    grids = backbone.activations(pixels, IDS, BLOCKS)
    assert len(states) == 4
    for i, layer in enumerate(BLOCKS):
        assert_patches(grids[layer], states[i + 1][:, 1:], size // 8)


def test_clip_has_its_own_normalisation(clip_folder):
    transform = load_backbone(str(clip_folder), device="cpu").transform
    grey = transform(picture(0).point(lambda _: 128))
    expected = [(128 / 255 - m) / s for m, s in ((0.48145466, 0.26862954), (0.4578275, 0.26130258))]
    torch.testing.assert_close(grey[:2, 0, 0], torch.tensor(expected))
    assert transform.interpolation == "bicubic" and grey.shape == (3, 32, 32)


def test_a_processor_config_overrides_the_normalisation(tmp_path):
    folder = tiny_clip(tmp_path)
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    changes = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "resample": 2}
    path.write_text(json.dumps(config | changes))
    transform = load_backbone(str(folder), device="cpu").transform
    assert transform.mean == (0.5, 0.4, 0.3) and transform.std == (0.1, 0.2, 0.3)
    assert transform.interpolation == "bilinear"


@pytest.mark.parametrize("size", [28, 42])
def test_dinov2_blocks_are_its_hidden_states(dino_folder, size):
    backbone = load_backbone(str(dino_folder), image_size=size, device="cpu")
    pixels = pictures(backbone)
    with torch.no_grad():
        output = Dinov2Model.from_pretrained(dino_folder).eval()(pixels, output_hidden_states=True)
    grids = backbone.activations(pixels, IDS, [*BLOCKS, "norm"])
    for i, layer in enumerate(BLOCKS):
        assert_patches(grids[layer], output.hidden_states[i + 1][:, 1:], size // 7)
    assert_patches(grids["norm"], output.last_hidden_state[:, 1:], size // 7)
    assert (grids["norm"] - grids["block2"]).abs().max() > 0.1


def test_dinov2_has_imagenets_normalisation(dino_folder):
    transform = load_backbone(str(dino_folder), device="cpu").transform
    assert transform.mean == (0.485, 0.456, 0.406) and transform.std == (0.229, 0.224, 0.225)


def test_register_tokens_are_dropped(tmp_path):
    folder = tiny_dinov2(tmp_path, registers=3)
    backbone = load_backbone(str(folder), device="cpu")
    pixels = pictures(backbone)
    with torch.no_grad():
        model = Dinov2WithRegistersModel.from_pretrained(folder).eval()
        tokens = model(pixels).last_hidden_state
    assert tokens.shape[1] == 1 + 3 + 16
    assert_patches(backbone.activations(pixels, IDS, ["norm"])["norm"], tokens[:, 4:], 4)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_a_cut_model_gives_the_same_with_fewer_parameters(clip_folder, dino_folder, kind):
    folder = str(clip_folder if kind == "clip" else dino_folder)
    whole = load_backbone(folder, device="cpu")
    small = load_backbone(folder, layers=["block1"], device="cpu")
    assert list(small.layers) == ["block0", "block1"]
    gone = sum(p.numel() for p in whole.modules["block2"].parameters())
    count = sum(p.numel() for p in small.model.parameters())
    norm = 0 if kind == "clip" else 32
    assert count == sum(p.numel() for p in whole.model.parameters()) - gone - norm
    pixels = pictures(whole)
    expected = whole.activations(pixels, IDS, ["block1"])["block1"]
    assert torch.equal(small.activations(pixels, IDS, ["block1"])["block1"], expected)


@pytest.mark.parametrize("settings", [{"attention": "eager"}, {"dtype": "bfloat16"}])
def test_settings_change_little(clip_folder, settings):
    plain = load_backbone(str(clip_folder), device="cpu")
    other = load_backbone(str(clip_folder), device="cpu", **settings)
    pixels = pictures(plain)
    expected = plain.activations(pixels, IDS, ["block2"])["block2"]
    ours = other.activations(pixels, IDS, ["block2"])["block2"]
    assert (ours - expected).norm() / expected.norm() < 0.05
    torch.testing.assert_close(
        plain.activations(pixels[:1], IDS[:1], ["block2"])["block2"],
        expected[:1],
        atol=1e-6,
        rtol=1e-5,
    )


def test_mistakes_are_named(clip_folder):
    backbone = load_backbone(str(clip_folder), device="cpu")
    pixels = pictures(backbone)
    with pytest.raises(ValueError, match="works without noise: leave the timestep 25 out"):
        backbone.activations(pixels, IDS, ["block0"], timestep=25)
    with pytest.raises(ValueError, match="takes no prompts"):
        backbone.activations(pixels, IDS, ["block0"], prompts=["a", ""])
    assert backbone.activations(pixels, IDS, ["block0"], prompts=["", ""])["block0"].shape[0] == 2
    with pytest.raises(KeyError, match=r"unknown layer 'block3' .* block0, block1, block2"):
        backbone.activations(pixels, IDS, ["block3"])
    with pytest.raises(ValueError, match=r"image_size 30 doesn't fit .* multiples of 8"):
        load_backbone(str(clip_folder), image_size=30)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "registers"])
def test_embeddings_are_the_models_own(tmp_path, kind):
    make, own, kwargs = {
        "clip": (tiny_clip, CLIPModel, {}),
        "dinov2": (tiny_dinov2, Dinov2Model, {}),
        "registers": (tiny_dinov2, Dinov2WithRegistersModel, {"registers": 4}),
    }[kind]
    folder = make(tmp_path / kind, **kwargs)
    backbone = load_backbone(str(folder), device="cpu")
    assert isinstance(backbone, EmbeddingModel) and not isinstance(backbone, DiffusionModel)
    model = own.from_pretrained(folder).eval()
    pixels = pictures(backbone)
    with torch.no_grad():
        output = (model.vision_model if kind == "clip" else model)(pixels)
    first = 5 if kind == "registers" else 1
    wanted = torch.stack([output.pooler_output, output.last_hidden_state[:, first:].mean(1)], dim=1)
    torch.testing.assert_close(backbone.embed(pixels), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="was cut when it was loaded, so it can't embed"):
        load_backbone(str(folder), layers=["block0"], device="cpu").embed(pixels)
