"""DiT against diffusers' own uncut transformer: noised input, null class, tokens put on the grid."""

import json

import pytest
import torch
from backbones_helpers import picture, tiny_dit
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from revelio.backbones.diffusion.schedule import keyed_noise
from revelio.backbones.hooks import tokens_to_grid
from revelio.backbones.layers import LayerSpec, dit_layers
from revelio.backbones.registry import load_backbone

IDS = ["a", "b"]
LAYERS = ["block0", "block1", "block2", "block3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(str(folder), device="cpu")


@pytest.fixture(scope="module")
def encoded(backbone):
    return backbone.encode(torch.stack([backbone.transform(picture(i)) for i in range(2)]))


def reference_tokens(folder, latents, timestep, classes):
    """Every block's tokens from the whole transformer, on noised latents."""
    transformer = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer").eval()
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    kept = {}
    for i, block in enumerate(transformer.transformer_blocks):
        block.register_forward_hook(lambda _m, _i, out, i=i: kept.update({f"block{i}": out}))
    noise = keyed_noise(latents.shape[1:], IDS, seed=0, timestep=timestep, draw=0)
    steps = torch.full((len(latents),), timestep)
    noised = scheduler.add_noise(latents.float(), noise, steps)
    with torch.no_grad():
        transformer(noised, steps, class_labels=torch.tensor(classes))
    return kept


@pytest.mark.parametrize(
    ("prompts", "classes"), [(None, [10, 10]), (["", "3"], [10, 3]), (["0", "9"], [0, 9])]
)
def test_grids_equal_hooks_on_the_whole_transformer(folder, backbone, encoded, prompts, classes):
    expected = reference_tokens(folder, encoded, 25, classes)
    ours = backbone.activations(encoded, IDS, LAYERS, timestep=25, prompts=prompts)
    for layer in LAYERS:
        assert ours[layer].shape == (2, 16, 8, 8)
        for row in range(8):
            for column in range(8):
                token = expected[layer][:, row * 8 + column]
                torch.testing.assert_close(
                    ours[layer][:, :, row, column], token, atol=1e-5, rtol=1e-4
                )


def test_tokens_stand_where_their_patches_were():
    tokens = torch.zeros(1, 6, 3)
    tokens[0, 4] = torch.tensor([1.0, 2.0, 3.0])
    grid = tokens_to_grid(tokens, 2, 3)
    assert grid.shape == (1, 3, 2, 3)
    assert grid[0, :, 1, 1].tolist() == [1.0, 2.0, 3.0]
    assert grid.sum() == 6


def test_a_change_in_one_corner_shows_in_that_corner(backbone, encoded):
    changed = encoded.clone()
    changed[:, :, :2, 14:] += 4
    before = backbone.activations(encoded, IDS, ["block0"], timestep=0)["block0"]
    after = backbone.activations(changed, IDS, ["block0"], timestep=0)["block0"]
    moved = (after - before).norm(dim=1)[0]
    assert divmod(int(moved.argmax()), 8) == (0, 7)


def test_noise_is_added_at_the_timestep(backbone, encoded):
    first = backbone.activations(encoded, IDS, ["block0"], timestep=500, draw=0)["block0"]
    second = backbone.activations(encoded, IDS, ["block0"], timestep=500, draw=1)["block0"]
    assert (first - second).abs().max() > 1e-2


def test_a_cut_model_gives_the_same_with_fewer_parameters(folder, backbone, encoded):
    small = load_backbone(str(folder), layers=["block1", "block0"], device="cpu")
    assert list(small.layers) == ["block0", "block1"]
    whole = backbone.transformer
    gone = sum(p.numel() for block in whole.transformer_blocks[2:] for p in block.parameters())
    assert gone > 0
    assert small.transformer.num_parameters() == whole.num_parameters() - gone
    expected = backbone.activations(encoded, IDS, ["block1"], timestep=25)["block1"]
    assert torch.equal(small.activations(encoded, IDS, ["block1"], timestep=25)["block1"], expected)


def test_grids_do_not_change_with_batch_size(backbone, encoded):
    together = backbone.activations(encoded, IDS, ["block3"], timestep=25)["block3"]
    for i, name in enumerate(IDS):
        alone = backbone.activations(encoded[i : i + 1], [name], ["block3"], timestep=25)["block3"]
        torch.testing.assert_close(alone[0], together[i], atol=1e-6, rtol=1e-5)


def test_eager_attention_agrees(folder, backbone, encoded):
    eager = load_backbone(str(folder), attention="eager", device="cpu")
    ours = eager.activations(encoded, IDS, ["block3"], timestep=25)["block3"]
    expected = backbone.activations(encoded, IDS, ["block3"], timestep=25)["block3"]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_near(folder, backbone, encoded):
    low = load_backbone(str(folder), dtype="bfloat16", device="cpu")
    ours = low.activations(encoded, IDS, ["block3"], timestep=25)["block3"]
    expected = backbone.activations(encoded, IDS, ["block3"], timestep=25)["block3"]
    assert 0 < (ours - expected).norm() / expected.norm() < 0.05


def test_other_image_sizes_move_the_positions(folder):
    backbone = load_backbone(str(folder), image_size=48, device="cpu")
    encoded = backbone.encode(backbone.transform(picture(0))[None])
    grid = backbone.activations(encoded, ["a"], ["block0"], timestep=0)["block0"]
    assert grid.shape == (1, 16, 12, 12)
    with pytest.raises(ValueError, match="multiples of 4"):
        load_backbone(str(folder), image_size=50)


def test_classes_by_name(tmp_path):
    folder = tiny_dit(tmp_path)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}}))
    backbone = load_backbone(str(folder), device="cpu")
    classes = backbone.classes(["", "Tinca tinca", "goldfish", "7"])
    assert classes.tolist() == [10, 0, 1, 7]
    with pytest.raises(ValueError, match="conditioned on classes, not on text like 'a dog'"):
        backbone.classes(["a dog"])
    with pytest.raises(ValueError, match="from 0 to 9"):
        backbone.classes(["10"])


def test_mistakes_are_named(backbone, encoded):
    with pytest.raises(ValueError, match="give a timestep"):
        backbone.activations(encoded, IDS, ["block0"])
    with pytest.raises(KeyError, match="unknown layer 'block4'"):
        backbone.activations(encoded, IDS, ["block4"], timestep=0)


def test_the_full_size_dit_has_1152_channels():
    """DiT-XL/2 at 512 px on the meta device, two of its 28 equal blocks."""
    config = {"num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2}
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(**config, num_layers=2, out_channels=8, sample_size=64)
        kept = []
        transformer.transformer_blocks[1].register_forward_hook(
            lambda _m, _i, out: kept.append(out)
        )
        labels = torch.empty(1, dtype=torch.long)
        with torch.no_grad():
            transformer(torch.empty(1, 4, 64, 64), labels, class_labels=labels)
    assert kept[0].shape == (1, 1024, 1152)
    layers = dit_layers(config | {"num_layers": 28}, {"block_out_channels": (1, 1, 1, 1)})
    assert list(layers)[-1] == "block27" and len(layers) == 28
    assert layers["block27"] == LayerSpec(1152, 512 // 32)
