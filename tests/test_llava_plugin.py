"""Revelio's towers in LLaVA's builders: against a stand-in that has the names of its files.

The package itself is asked in tests/optional/check_llava.py.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from llava_helpers import picture, tower_configs
from torch import nn
from transformers import AutoImageProcessor, CLIPVisionModel

from llava_ext.images import image_id
from llava_ext.llava_plugin import install, read_tower_names, tower_names
from llava_ext.towers import load_tower

FILES = {
    "multimodal_encoder/builder.py": (
        "def build_vision_tower(config, **settings):\n    return config, settings\n"
    ),
    "multimodal_projector/builder.py": (
        "from torch import nn\n"
        "def build_vision_projector(config, delay_load=False, **settings):\n"
        "    return nn.Linear(config.mm_hidden_size, config.hidden_size)\n"
    ),
    "llava_arch.py": (
        "from .multimodal_encoder.builder import build_vision_tower\n"
        "from .multimodal_projector.builder import build_vision_projector\n"
    ),
}


@pytest.fixture
def arch(tmp_path, monkeypatch):
    """``llava.model.llava_arch`` with the plug-in installed."""
    for name, text in FILES.items():
        path = tmp_path / "llava" / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    import llava.model.llava_arch as found  # pyright: ignore[reportMissingImports]

    install()
    install()
    yield found
    for name in [key for key in sys.modules if key.partition(".")[0] == "llava"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, str]:
    towers = tower_configs(tmp_path_factory.mktemp("towers"))
    return {name: tower_names([config]) for name, config in towers.items()}


def settings(name: str, **more) -> SimpleNamespace:
    return SimpleNamespace(mm_vision_tower=name, hidden_size=32, mm_hidden_size=16, **more)


def test_a_clip_tower_gives_transformers_own_tokens(arch, names) -> None:
    tower = arch.build_vision_tower(settings(names["clip"]))
    folder = names["clip"].removeprefix("revelio:").rpartition("/")[0]
    image = picture(1, (61, 47))
    theirs = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")
    with torch.no_grad():
        states = CLIPVisionModel.from_pretrained(folder)(
            theirs["pixel_values"], output_hidden_states=True
        ).hidden_states
    seen = tower.image_processor.preprocess(image, return_tensors="pt")["pixel_values"]
    assert seen.shape[1:] == (3, *tower.image_processor.crop_size.values())
    for numbers in (seen, seen.half(), seen.bfloat16()):
        found = tower(numbers)
        assert found.dtype == numbers.dtype and found.shape == (1, tower.num_patches, 16)
        wanted = states[2][:, 1:].to(numbers.dtype)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert tower.num_patches_per_side**2 == tower.num_patches == 16
    assert tower.hidden_size == tower.config.hidden_size == tower.dummy_feature.shape[1] == 16
    assert not tower.state_dict() and not list(tower.parameters())
    assert tower.bfloat16().dtype == torch.bfloat16 and tower.device.type == "cpu"
    assert type(arch.build_vision_projector(settings(names["clip"]))) is nn.Linear


def test_several_towers_are_projected_each_and_interleaved(arch, names) -> None:
    config = settings(f"{names['clip']}+{names['sd']}", mm_projector_type="mlp2x_gelu")
    tower, projectors = arch.build_vision_tower(config), arch.build_vision_projector(config)
    images = [picture(1), picture(2)]
    grids = tower(tower.image_processor(images, return_tensors="pt")["pixel_values"].half().float())
    for one, grid in zip(read_tower_names(config.mm_vision_tower), grids, strict=True):
        own = load_tower(one, "cpu")
        pixels = torch.stack([own.pixels(image) for image in images])
        assert torch.equal(grid, own.grids(pixels, [image_id(image) for image in images]))
    tokens = projectors(grids)
    assert tokens.shape == (2, tower.num_patches, 32) and tower.num_patches == 32
    assert torch.equal(tokens[:, 0::2], projectors[0](grids[0]))
    assert torch.equal(tokens[:, 1::2], projectors[1](grids[1]))
    # A sample without a picture has zeros in its place.
    assert tower([torch.zeros(3, *tower.image_processor.crop_size.values())])[0][1].shape[0] == 1
    with pytest.raises(ValueError, match="32 interleaved tokens stand in no square"):
        _ = tower.num_patches_per_side
    with pytest.raises(ValueError, match="not `linear`: give mm_projector_type mlp2x_gelu"):
        arch.build_vision_projector(settings(config.mm_vision_tower, mm_projector_type="linear"))


def test_weights_are_loaded_when_they_are_asked_for(arch, names) -> None:
    with torch.device("meta"):  # as transformers builds a model that it loads
        tower = arch.build_vision_tower(settings(names["dinov2"]), delay_load=True)
    assert not tower.is_loaded and tower.hidden_size == 16 and tower.device.type == "cpu"
    tower.load_model(device_map="cpu")
    tower.load_model()
    assert tower.is_loaded and len(tower.towers) == 1


def test_names(arch, names) -> None:
    assert arch.build_vision_tower(SimpleNamespace(vision_tower="openai/x"), delay_load=True) == (
        SimpleNamespace(vision_tower="openai/x"),
        {"delay_load": True},
    )
    pooled = f"{names['clip']}:pool4+{names['dinov2']}:pool4"
    assert [one.budget for one in read_tower_names(pooled)] == [4, 4]
    assert tower_names(read_tower_names(pooled)) == pooled
    for wrong, error, message in (
        ("revelio:x", ValueError, "names no tower: give revelio:BACKBONE/LAYER"),
        ("revelio:sd-1.5/up_ft9@t25", KeyError, "up_ft9"),
        ("revelio:os:system/up_ft1", KeyError, "unknown backbone"),
        (f"{names['clip']}:pool3", ValueError, "square number"),
    ):
        with pytest.raises(error, match=message):
            arch.build_vision_tower(settings(wrong), delay_load=True)
