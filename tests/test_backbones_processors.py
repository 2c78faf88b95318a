"""Towers and classifiers see what the models' own image processors give, on pictures of every shape."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import noise_picture
from PIL import Image
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, ViTImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from revelio.backbones.source import Source
from revelio.backbones.vit import transform_of

SQUARE = {"height": 32, "width": 32}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
CASES = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 37}, crop_size=SQUARE),
    "dinov2, smaller than its crop": BitImageProcessorPil(
        size={"shortest_edge": 27}, crop_size=SQUARE
    ),
    "vit": ViTImageProcessorPil(size=SQUARE, image_mean=MEAN, image_std=STD),
    "siglip": SiglipImageProcessorPil(size=SQUARE),
    "deit": DeiTImageProcessorPil(size={"height": 37, "width": 37}, crop_size=SQUARE),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 32}),
    "lanczos": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE, resample=1),
}
# Landscapes and portraits whose sides differ by 0 to 64 pixels, at the model's size, above and below it.
SHAPES = [(32 + more, 32) for more in range(65)] + [(32, 32 + more) for more in range(1, 65)]
SHAPES += [(61 + more, 61) for more in range(0, 65, 7)] + [
    (13, 13 + more) for more in range(0, 65, 7)
]
# As the files of older versions say the same.
OLDER = {
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32},
    "vit": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32},
    "deit": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 37, "crop_size": 32},
}


def source_of(folder: Path, entries: dict) -> Source:
    (folder / "preprocessor_config.json").write_text(json.dumps(entries))
    return Source("m", str(folder))


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_the_image_processor_s_own(name: str, tmp_path: Path) -> None:
    processor = CASES[name]
    entries = processor.to_dict()
    source = source_of(tmp_path, entries)
    transform = transform_of(source, source.crop_size(7))
    if name in OLDER:
        for key in ("size", "crop_size", "image_processor_type"):
            entries.pop(key, None)
        assert transform_of(source_of(tmp_path, entries | OLDER[name]), 32) == transform
    for number, shape in enumerate(SHAPES):
        picture = noise_picture(*shape, seed=number)
        wanted = processor(picture, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(transform(picture), wanted, rtol=0, atol=1e-5, msg=str(shape))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(90, 41), (33, 70), (64, 64), (20, 31)])
def test_a_crop_shows_the_square_that_the_processor_takes(
    name: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    processor = CASES[name]
    source = source_of(tmp_path, processor.to_dict())
    crop = transform_of(source, source.crop_size(7)).crop
    # Red says the column and green the row; blue is 0 only beyond the picture.
    ramp = np.full((shape[1], shape[0], 3), 255, np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(shape[0]), np.arange(shape[1])[:, None]
    plain = processor(
        Image.fromarray(ramp), do_normalize=False, do_rescale=False, return_tensors="np"
    )
    wanted = plain.pixel_values[0].transpose(1, 2, 0).astype(float)
    seen = np.asarray(crop.view(Image.fromarray(ramp), (32, 32), "nearest")).astype(float)
    there = wanted[..., 2] > 0
    assert (there == (seen[..., 2] > 0)).all() and there.mean() > 0.6
    # Half a pixel by the nearest one, one by the ramp's ends, where interpolation has no neighbor.
    assert np.abs(seen - wanted)[there][:, :2].max() < 1.6
    # At another size it is the same square: each pixel of the small view stands for 2 x 2.
    small = np.asarray(crop.view(Image.fromarray(ramp), (16, 16), "nearest")).astype(float)
    whole = there.reshape(16, 2, 16, 2).all((1, 3))
    assert np.abs(small - wanted.reshape(16, 2, 16, 2, 3).mean((1, 3)))[whole][:, :2].max() < 2.5


def test_another_size_takes_the_same_share_of_the_picture(tmp_path: Path) -> None:
    source = source_of(tmp_path, CASES["dinov2"].to_dict())
    assert transform_of(source, 64).resize == 74
    assert repr(transform_of(source, 32)).endswith("interpolation='bicubic', resize=37)")
    clip = transform_of(source_of(tmp_path, CASES["clip"].to_dict()), 48)
    assert clip.resize is None and repr(clip).endswith("interpolation='bicubic')")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "has size .* the side of a square"),
        ({"size": {"height": 32, "width": 48}}, "the side of a square"),
        ({"crop_size": [[32]]}, "has crop_size"),
        ({"rescale_factor": 1 / 127.5}, "has rescale_factor 0.0078.*only"),
        ({"do_resize": False}, "has do_resize False"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(changes, message, tmp_path: Path) -> None:
    source = source_of(tmp_path, CASES["clip"].to_dict() | changes)
    with pytest.raises(ValueError, match=message):
        transform_of(source, source.crop_size(32))
