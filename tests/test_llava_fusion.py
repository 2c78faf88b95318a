"""Joining towers' tokens against plain loops; the check that their tokens mean the same place."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_helpers import tower_configs
from llava_train_helpers import data_options, pretrain, tiny_project

from llava_ext.cli import cache
from llava_ext.config import CacheConfig, TowerConfig
from llava_ext.fusion import check_alignment, fuse, fused_length, widths
from llava_ext.images import smooth_picture
from llava_ext.run import run
from llava_ext.towers import load_tower, load_towers


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), st.integers(1, 3))
def test_interleave_takes_a_token_of_each_tower_by_turns(towers, images, size, width):
    tokens = [torch.randn(images, size, width) for _ in range(towers)]
    found = fuse("interleave", tokens)
    assert found.shape == (images, towers * size, width)
    for image in range(images):
        for place in range(towers * size):
            wanted = tokens[place % towers][image, place // towers]
            assert torch.equal(found[image, place], wanted)


def test_two_towers_interleave_as_the_released_code_does():
    clip, sd = torch.randn(2, 256, 8), torch.randn(2, 256, 8)
    found = fuse("interleave", [clip, sd])
    assert torch.equal(found[:, 0::2], clip) and torch.equal(found[:, 1::2], sd)


def test_sequence_and_channels():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    assert torch.equal(fuse("sequence", [a, b])[:, 3:], b)
    assert torch.equal(fuse("sequence", [a, b])[:, :3], a)
    c = torch.randn(2, 3, 2)
    assert torch.equal(fuse("channels", [a, c])[..., 4:], c)
    assert fused_length("sequence", [3, 5]) == 8 and fused_length("channels", [3, 3]) == 3


@pytest.mark.parametrize("kind", ["interleave", "channels"])
def test_unequal_towers_can_only_follow_each_other(kind):
    with pytest.raises(ValueError, match=r"3, 5 tokens .*choose `fusion: sequence`"):
        fuse(kind, [torch.zeros(1, 3, 4), torch.zeros(1, 5, 4)])


@given(st.integers(1, 6), st.integers(6, 50))
def test_channels_share_the_width(towers, width):
    shares = widths("channels", towers, width)
    assert sum(shares) == width and max(shares) - min(shares) <= 1 and len(shares) == towers
    assert widths("interleave", towers, width) == [width] * towers


def test_more_towers_than_channels_is_an_error():
    with pytest.raises(ValueError, match="3 towers can't share 2 channels"):
        widths("channels", 3, 2)


class Squashing:
    """A tower that squashes its pictures instead of cropping them, or mirrors them."""

    config = TowerConfig("squash", "block0", budget=16)
    channels, grid = 1, (4, 4)

    def __init__(self, *, mirrored: bool = False):
        self.mirrored = mirrored

    def pixels(self, image):
        picture = image.resize((32, 32))
        values = torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
        return values.flip(2) if self.mirrored else values


def test_alignment_warns_of_another_crop_or_raster(tmp_path):
    configs = tower_configs(tmp_path)
    clip, dinov2, sd = (load_tower(configs[name], "cpu") for name in ("clip", "dinov2", "sd"))
    assert check_alignment("interleave", [clip, dinov2, sd]) == []
    padded = load_tower(configs["sd"], "cpu", "pad")
    (warning,) = check_alignment("channels", [clip, padded])
    assert "don't see the same part" in warning and "`fusion: channels`" in warning
    assert check_alignment("sequence", [clip, padded]) == check_alignment("interleave", []) == []
    for tower in (Squashing(), Squashing(mirrored=True)):
        (warning,) = check_alignment("interleave", [clip, tower])  # type: ignore[list-item]
        assert "squash" in warning and "same part" in warning
    coarse = TowerConfig(configs["sd"].backbone, "up_ft1", 25, tokens="pool", budget=4)
    (warning,) = check_alignment("interleave", [clip, load_tower(coarse, "cpu")])
    assert "4x4 and 2x2" in warning


def test_the_probe_picture_is_always_the_same():
    assert smooth_picture(9, 6).tobytes() == smooth_picture(9, 6).tobytes()
    assert smooth_picture(9, 6).size == (9, 6)


def test_a_cache_and_a_stage_warn_before_they_begin(tmp_path, capsys):
    model = tiny_project(tmp_path, records=4)
    file = tmp_path / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"shortest_edge": 64}}))
    run(pretrain((tmp_path, model), tmp_path / "out"))
    data = data_options(tmp_path)
    cache.run(CacheConfig(cache=tmp_path / "c", data=data, model=model, plan=True))
    found = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    (warning,) = check_alignment(model.fusion, load_towers(model, "cpu"))
    assert "same part" in warning and found == [f"warning: {warning}"] * 2
