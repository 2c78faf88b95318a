import math

import numpy as np
import pytest
import torch
from data_helpers import noise_picture, resize_matrix, square_by_formula
from PIL import Image

from revelio.data.transforms import RandomCropTransform, SquareTransform
from revelio.seeds import generator

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(31, 20, 8), (20, 31, 8), (17, 17, 8), (8, 11, 8), (7, 12, 16), (33, 50, 13), (50, 33, 14)],
)
def test_square_equals_the_written_out_resize_and_crop(width: int, height: int, size: int) -> None:
    image = noise_picture(width, height)
    pixels = SquareTransform(size, ZERO, ONE)(image)
    wanted = square_by_formula(np.asarray(image), size)
    assert pixels.shape == (3, size, size)
    # Pillow rounds to 8 bits after each direction: at most one step off the exact value.
    assert np.abs(pixels.permute(1, 2, 0).numpy() * 255 - wanted).max() < 1.01


def test_square_agrees_with_torch_antialiasing() -> None:
    image = noise_picture(40, 40, seed=3)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(values, (16, 16), mode="bilinear", antialias=True)
    pixels = SquareTransform(16, ZERO, ONE)(image)
    assert (pixels * 255 - wanted[0]).abs().max() < 1.01


@pytest.mark.parametrize(("long", "left"), [(9, 0), (10, 1), (11, 2), (13, 2), (15, 4)])
def test_square_rounds_the_crop_offset_half_to_even(long: int, left: int) -> None:
    # No resize: the red of a pixel is its column. (long - 8) / 2 is 0.5, 1, 1.5, 2.5, 3.5.
    columns = np.zeros((8, long, 3), dtype=np.uint8)
    columns[..., 0] = np.arange(long)
    pixels = SquareTransform(8, ZERO, ONE)(Image.fromarray(columns))
    assert (pixels[0, 0] * 255).round().int().tolist() == list(range(left, left + 8))


def test_square_cuts_the_longer_side_to_whole_pixels() -> None:
    # 10 * 29 / 20 = 14.5: 14 columns, offset 2. Rounding up instead would shift the ramp by half a step.
    ramp = np.zeros((20, 29, 3), dtype=np.uint8)
    ramp[..., 0] = np.arange(29) * 8
    pixels = SquareTransform(10, ZERO, ONE)(Image.fromarray(ramp))
    centres = (np.arange(2, 12) + 0.5) * (29 / 14) - 0.5
    assert np.abs(pixels[0, 5].numpy() * 255 - centres * 8).max() < 1.5


def test_normalisation_is_per_channel() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    pixels = SquareTransform(4, mean, std)(Image.new("RGB", (4, 4), (51, 102, 204)))
    wanted = [(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (0.8 - 0.3) / 2.0]
    assert torch.allclose(pixels[:, 0, 0], torch.tensor(wanted))
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()


def test_interpolation_is_a_setting() -> None:
    image = noise_picture(20, 20)
    bicubic = SquareTransform(8, ZERO, ONE, interpolation="bicubic")(image) * 255
    wanted = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert (bicubic.round().permute(1, 2, 0).numpy() == wanted).all()


def _crop_box(pixels: torch.Tensor, width: int, height: int) -> tuple[float, float, bool]:
    """Share of the area, aspect ratio and mirroring of a crop from a picture of linear ramps."""
    across, down = pixels[0].mean(0).double(), pixels[1].mean(1).double()
    middle = slice(8, 24)  # away from the edges, where a resized ramp is linear
    steps = torch.arange(16, dtype=torch.float64)
    slopes = [
        float(((steps - 7.5) * values[middle]).sum() / ((steps - 7.5) ** 2).sum())
        for values in (across, down)
    ]
    wide, high = abs(slopes[0]) * 32 * width, abs(slopes[1]) * 32 * height
    return wide * high / (width * height), wide / high, slopes[0] < 0


def test_random_crops_cover_the_stated_range_and_flip_half() -> None:
    width, height = 200, 190
    ramps = np.zeros((height, width, 3), dtype=np.uint8)
    ramps[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)
    ramps[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    image = Image.fromarray(ramps)
    transform = RandomCropTransform(32, ZERO, ONE, scale=(0.3, 0.5))
    found = [_crop_box(transform(image, generator(7, n)), width, height) for n in range(400)]
    areas, ratios, flips = (np.array(column) for column in zip(*found, strict=True))
    assert 0.29 < areas.min() < 0.32 and 0.48 < areas.max() < 0.51
    assert abs(areas.mean() - 0.4) < 0.012
    assert 0.74 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.35
    assert abs(np.log(ratios).mean()) < 0.03  # uniform in the logarithm
    assert np.log(ratios).std() == pytest.approx(math.log(16 / 9) / math.sqrt(12), rel=0.1)
    assert abs(flips.mean() - 0.5) < 0.08


def test_random_crop_of_the_whole_is_the_resize_up_to_flip() -> None:
    image = noise_picture(12, 12)
    crop = RandomCropTransform(6, ZERO, ONE, scale=(1.0, 1.0))
    plain = SquareTransform(6, ZERO, ONE)(image)
    pixels = [crop(image, generator(n)) for n in range(40)]
    matches = [torch.equal(found, plain) or torch.equal(found, plain.flip(-1)) for found in pixels]
    # All of the area fits only where the ratio draws close to 1, or after ten attempts: the whole.
    assert sum(matches) > 20


def test_random_crop_of_a_long_picture_keeps_the_ratio_and_the_middle() -> None:
    columns = np.zeros((8, 200, 3), dtype=np.uint8)
    columns[..., 0] = np.arange(200)
    pixels = RandomCropTransform(8, ZERO, ONE)(Image.fromarray(columns), generator(0)) * 255
    # 8 * 4 / 3 rounds to 11 columns from (200 - 11) // 2 = 94.
    assert pixels[0].mean().item() == pytest.approx(94 + 5, abs=0.6)
    assert pixels[0].min() >= 94 and pixels[0].max() <= 104


def test_random_crop_depends_on_its_generator_only() -> None:
    image, transform = noise_picture(30, 20), RandomCropTransform(8)
    first = transform(image, generator(1, "a"))
    torch.manual_seed(123)
    assert torch.equal(first, transform(image, generator(1, "a")))
    assert not torch.equal(first, transform(image, generator(1, "b")))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="image size is 0"):
        SquareTransform(0)
    with pytest.raises(ValueError, match="three numbers"):
        SquareTransform(8, std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="scale is"):
        RandomCropTransform(8, scale=(0.9, 0.8))


def test_a_random_crop_is_cut_before_it_is_resized() -> None:
    image, transform = noise_picture(40, 40, seed=9), RandomCropTransform(8, ZERO, ONE)
    for n in range(6):
        left, top, right, bottom = transform._box(40, 40, generator(n))
        part = np.asarray(image)[top:bottom, left:right].astype(float)
        rows, columns = resize_matrix(bottom - top, 8), resize_matrix(right - left, 8)
        wanted = np.einsum("ih,jw,hwc->ijc", rows, columns, part)
        pixels = transform(image, generator(n)).permute(1, 2, 0).numpy() * 255
        error = min(np.abs(found - wanted).max() for found in (pixels, pixels[:, ::-1]))
        assert error < 1.01


def test_random_crops_reach_every_place() -> None:
    transform = RandomCropTransform(8, scale=(0.7, 0.9))
    boxes = [transform._box(10, 10, generator(n)) for n in range(200)]
    assert {min(box[0] for box in boxes), min(box[1] for box in boxes)} == {0}
    assert {max(box[2] for box in boxes), max(box[3] for box in boxes)} == {10}
    nine_wide = [box[0] for box in boxes if box[2] - box[0] == 9]
    assert 0.3 < np.mean(nine_wide) < 0.7  # 0 and 1 alike
