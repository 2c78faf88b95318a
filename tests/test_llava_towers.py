"""Towers against the libraries' own models; noise keyed by content; padding; what identifies a tower."""

import pytest
import torch
from llava_helpers import picture, tower_configs
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModel, Dinov2Model

from llava_ext import towers
from llava_ext.config import ModelConfig, TowerConfig
from llava_ext.images import image_id, open_picture, pad_to_square, transform_from
from llava_ext.towers import load_tower, load_towers, plain_transforms, register, weights_hash


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return tower_configs(tmp_path_factory.mktemp("towers"))


def see(tower, *images: Image.Image) -> torch.Tensor:
    ids = [image_id(image) for image in images]
    return tower.grids(torch.stack([tower.pixels(image) for image in images]), ids)


def test_clip_is_its_own_hidden_state_without_the_class_token(configs):
    tower = load_tower(configs["clip"], "cpu")
    folder = configs["clip"].backbone
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = CLIPVisionModel.from_pretrained(folder)
    images = [picture(1), picture(2, (30, 50))]
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    # Three blocks, so that hidden_states[-2] is what block1 gives: LLaVA's choice.
    wanted = states[-2][:, 1:].transpose(1, 2).reshape(2, 16, 4, 4)
    assert torch.allclose(see(tower, *images), wanted, atol=1e-4)
    assert (tower.channels, tower.grid) == (16, (4, 4))


def test_dinov2_is_fed_its_own_normalisation(configs):
    tower = load_tower(configs["dinov2"], "cpu")
    model = Dinov2Model.from_pretrained(configs["dinov2"].backbone)
    image = picture(3, (28, 28))  # nothing to resize or crop
    values = torch.tensor(list(image.tobytes())).view(28, 28, 3).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (values - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        states = model(pixels[None], output_hidden_states=True).hidden_states
    wanted = states[-1][:, 1:].transpose(1, 2).reshape(1, 16, 4, 4)
    assert torch.allclose(see(tower, image), wanted, atol=1e-4)


def test_a_diffusion_tower_depends_on_nothing_but_the_picture(configs):
    tower = load_tower(configs["sd"], "cpu")
    assert (tower.channels, tower.grid) == (16, (8, 8))
    together = see(tower, picture(1), picture(2), picture(1))
    assert torch.equal(together[0], together[2])
    assert torch.allclose(together[1], see(tower, picture(2))[0], atol=1e-5)
    late = load_tower(TowerConfig(configs["sd"].backbone, "up_ft1", 200, budget=64), "cpu")
    assert not torch.allclose(see(late, picture(1))[0], together[0], atol=1e-2)
    drawn = load_tower(TowerConfig(configs["sd"].backbone, "up_ft1", 25, draw=1, budget=64), "cpu")
    assert not torch.allclose(see(drawn, picture(1))[0], together[0], atol=1e-3)
    told = load_tower(TowerConfig(configs["sd"].backbone, "up_ft1", 25, prompt="a cat"), "cpu")
    assert not torch.allclose(see(told, picture(1))[0], together[0], atol=1e-4)


def test_no_pictures_run_nothing(configs):
    tower = load_tower(configs["sd"], "cpu")
    assert tower.grids(torch.empty(0, 3, 32, 32), []).shape == (0, 16, 8, 8)


def test_the_image_id_is_of_what_is_seen(tmp_path):
    image = picture(5)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    names = {image_id(open_picture(tmp_path / name)) for name in ("a.png", "b.bmp")}
    assert names == {image_id(image)}
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    turned = Image.frombytes("RGB", image.size[::-1], image.tobytes())
    assert len({image_id(each) for each in (image, changed, turned)}) == 3


def test_a_picture_that_is_not_there_or_is_none(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    for name, message in [("b.png", "no image at"), ("a.png", "a.png.*no known picture format")]:
        with pytest.raises(ValueError, match=message):
            open_picture(tmp_path / name)


def test_padding_keeps_the_whole_picture_on_the_mean_colour(configs):
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    square = pad_to_square(wide, (0.2, 0.4, 0.6))
    assert square.size == (40, 40) and square.getpixel((5, 5)) == (51, 102, 153)
    assert square.crop((0, 10, 40, 30)).tobytes() == wide.tobytes()
    for name in configs:
        # In the tower's own normalisation its mean colour is zero: padding looks like nothing.
        pixels = load_tower(configs[name], "cpu", "pad").pixels(wide)
        assert pixels[:, 0].abs().max() < 0.02 and pixels[0, pixels.shape[1] // 2].min() > 0.5


def test_towers_of_a_model_share_what_is_the_same(configs):
    config = ModelConfig("x", (configs["clip"], configs["sd"], configs["clip"]))
    first, _, third = load_towers(config, "cpu")
    assert first is third


def test_a_saved_model_sees_as_it_was_trained(configs):
    config = ModelConfig("x", (configs["clip"],))
    entry = plain_transforms(load_towers(config, "cpu"))[0] | {"resize": 40}
    image = picture(1, (50, 37))
    (tower,) = load_towers(config, "cpu", transforms=[entry])
    assert torch.equal(tower.pixels(image), transform_from(entry)(image))
    assert not torch.equal(tower.pixels(image), load_towers(config, "cpu")[0].pixels(image))
    with pytest.raises(ValueError, match=r"unknown key `transforms\.rezise`"):
        load_towers(config, "cpu", transforms=[entry | {"rezise": 3}])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("clip", {"timestep": 25}, "leave the timestep 25 out"),
        ("clip", {"prompt": "a cat"}, "takes no prompt"),
        ("sd", {"timestep": None}, "timestep"),
        ("sd", {"timestep": 1000}, "1000"),
        ("sd", {"image_size": 33}, "multiples of"),
    ],
)
def test_a_setting_that_does_not_fit_fails_at_loading(configs, name, changes, message):
    config = configs[name]
    values = {"backbone": config.backbone, "layer": config.layer, "timestep": config.timestep}
    with pytest.raises(ValueError, match=message):
        load_tower(TowerConfig(**(values | changes)), "cpu")


def test_an_unknown_layer_or_backbone_lists_the_known(configs):
    with pytest.raises(KeyError, match="block0"):
        load_tower(TowerConfig(configs["clip"].backbone, "up_ft1"), "cpu")
    with pytest.raises(KeyError, match="known are"):
        load_tower(TowerConfig("clpi", "block1"), "cpu")


def test_identity_tells_weights_and_settings_apart(configs, tmp_path):
    one = load_tower(configs["clip"], "cpu").identity()
    assert one == load_tower(configs["clip"], "cpu").identity()
    pooled = TowerConfig(configs["clip"].backbone, "block1", tokens="pool", budget=4)
    assert load_tower(pooled, "cpu").identity() == one, "one cache serves all token steps"
    other = tower_configs_with_seed(tmp_path)
    assert load_tower(other, "cpu").identity()["weights"] != one["weights"]
    assert load_tower(configs["clip"], "cpu", "pad").identity() != one
    late = TowerConfig(configs["sd"].backbone, "up_ft1", 200)
    assert load_tower(late, "cpu").identity() != load_tower(configs["sd"], "cpu").identity()


def tower_configs_with_seed(folder):
    from backbones_helpers import tiny_clip

    return TowerConfig(str(tiny_clip(folder / "clip", seed=1)), "block1", budget=16)


def test_the_hash_covers_every_part_of_a_diffusion_tower(configs):
    backbone = load_tower(configs["sd"], "cpu").backbone  # type: ignore[attr-defined]
    seen = {weights_hash(backbone)}
    for part in (backbone.unet, backbone.latents.vae, backbone.text._model):
        with torch.no_grad():
            next(part.parameters()).add_(1)
        seen.add(weights_hash(backbone))
    assert len(seen) == 4


def test_a_tower_of_your_own(monkeypatch):
    monkeypatch.setattr(towers, "_registered", {})

    class Mean:
        def __init__(self, config, device, aspect):
            self.config, self.channels, self.grid = config, 3, (1, 1)

        def pixels(self, image):
            return torch.tensor(image.resize((1, 1)).getpixel((0, 0)))[:, None, None] / 255

        def grids(self, pixels, ids):
            return pixels

        def identity(self):
            return {"name": "mean"}

    register("mean", Mean)
    tower = load_tower(TowerConfig("mean", "only", budget=1))
    assert see(tower, Image.new("RGB", (4, 4), (255, 0, 51))).flatten().tolist() == pytest.approx(
        [1, 0, 0.2]
    )
    with pytest.raises(ValueError, match="'mean' is registered already"):
        register("mean", Mean)
