import pickle
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from data_helpers import noise_picture, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from revelio.data.config import Limits
from revelio.data.dataset import ImageError
from revelio.data.picture import decoded, read_picture


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_plain_pictures_come_out_as_they_are(tmp_path: Path) -> None:
    image = noise_picture(5, 4)
    (tmp_path / "a.png").write_bytes(png(image))
    for source in (png(image), tmp_path / "a.png"):
        read = read_picture(source, "a")
        assert read.mode == "RGB" and (np.asarray(read) == np.asarray(image)).all()


def test_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    image = noise_picture(5, 4)
    (tmp_path / "a.jpg").write_bytes(png(image))
    assert (np.asarray(read_picture(tmp_path / "a.jpg", "a")) == np.asarray(image)).all()


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65000, 65535]], dtype=np.uint16)
    read = np.asarray(read_picture(png(Image.fromarray(values)), "x"))
    assert (read == np.round(values / 257).astype(np.uint8)[..., None]).all()
    tiff = np.asarray(read_picture(saved(Image.fromarray(values), "TIFF"), "x"))
    assert (tiff == read).all()


def test_big_endian_16_bit_tiff_is_scaled_too() -> None:
    values = np.array([[0, 300], [40000, 65535]], dtype=np.uint16)
    read = read_picture(_big_endian_tiff(values), "x")
    assert (np.asarray(read)[..., 0] == np.round(values / 257)).all()


def _big_endian_tiff(values: np.ndarray) -> bytes:
    height, width = values.shape
    tags = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (278, 3, height),
        (279, 4, values.size * 2),
    ]
    pixels = values.astype(">u2").tobytes()
    body = b"MM\x00*" + struct.pack(">I", 8 + len(pixels)) + pixels + struct.pack(">H", len(tags))
    for tag, kind, value in tags:
        body += struct.pack(">HHI", tag, kind, 1)
        body += struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
    return body + struct.pack(">I", 0)


def test_16_bit_colour_keeps_its_high_byte() -> None:
    pixel = struct.pack(">3H", 65535, 32768, 0)
    rows = b"\x00" + pixel * 2
    chunks = [
        (b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        crc = zlib.crc32(name + data)
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)
    assert read_picture(content, "x").getpixel((0, 0)) == (255, 128, 0)


def test_transparency_is_laid_on_white() -> None:
    layer = Image.new("RGBA", (2, 1), (200, 0, 100, 255))
    layer.putpixel((1, 0), (200, 0, 100, 51))
    read = read_picture(png(layer), "x")
    assert read.getpixel((0, 0)) == (200, 0, 100)
    # 0.2 of the colour and 0.8 of white.
    assert read.getpixel((1, 0)) == (244, 204, 224)


def test_palette_and_grey_transparency_are_laid_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    read = read_picture(png(palette, transparency=1), "x")
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert read_picture(png(grey), "x").getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_becomes_rgb() -> None:
    read = read_picture(saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG"), "x")
    red, green, blue = read.getpixel((4, 4))  # type: ignore[misc]
    assert read.mode == "RGB" and red < 5 and green > 250 and blue > 250


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_picture(content, "x").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int) -> None:
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3)
    # What a camera stores for each orientation, from the EXIF standard: where row 0 and column 0 lie.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored))
    for kind in ("PNG", "TIFF"):
        read = read_picture(saved(picture, kind, exif=exif.tobytes()), "x")
        assert (np.asarray(read)[..., 0] == upright).all(), kind
        # Nobody who gets it turns it again.
        assert (np.asarray(ImageOps.exif_transpose(read))[..., 0] == upright).all(), kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_picture_is_named(kind: str) -> None:
    content = saved(noise_picture(64, 64), kind)
    with pytest.raises(ImageError, match=r"^image cats/7.jpg can't be read: ") as caught:
        read_picture(content[: len(content) // 2], "cats/7.jpg")
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_says_why(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"empty \(0 bytes\)"):
        read_picture(b"", "x")
    with pytest.raises(ImageError, match="no known picture format"):
        read_picture(b"<html>not found</html>", "x")
    with pytest.raises(ImageError, match="no such file"):
        read_picture(tmp_path / "gone.jpg", "x")
    with pytest.raises(ImageError, match="32-bit fractions"):
        read_picture(saved(Image.new("F", (2, 2)), "TIFF"), "x")
    # Whatever the values: 200 of 2^32 would come out black, 200 of 255 not.
    for value in (200, 60_000, 70_000):
        with pytest.raises(ImageError, match="32-bit integers without a defined white"):
            read_picture(saved(Image.new("I", (2, 2), value), "TIFF"), "x")


@pytest.mark.parametrize("kind", ["DIB", "ICO", "PCX", "SGI", "QOI", "AVIF", "JPEG2000"])
def test_what_pillow_opens_is_read(kind: str) -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    # As two of Pillow's writers have it: formats without one of their own are left out.
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    read = read_picture(saved(image, kind), "x")
    assert read.mode == "RGB" and np.abs(np.asarray(read, int) - np.asarray(image, int)).max() <= 8


def test_limits_are_settings() -> None:
    content = png(Image.new("RGB", (40, 3)))
    assert read_picture(content, "x").size == (40, 3)
    with pytest.raises(ImageError, match=r"40 x 3 pixels, more than 119 \(max_pixels\)"):
        read_picture(content, "x", Limits(max_pixels=119))
    with pytest.raises(ImageError, match=r"sides beyond 13 to 1 \(max_ratio\)"):
        read_picture(content, "x", Limits(max_ratio=13))
    assert read_picture(content, "x", Limits(max_pixels=120, max_ratio=14)).size == (40, 3)


@given(st.integers(0, 2**32), st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]))
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_gives_a_picture_or_an_image_error(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(saved(noise_picture(16, 16), kind))
    for place in rng.integers(0, len(content), 8):
        content[place] = rng.integers(0, 256)
    try:
        assert read_picture(bytes(content), "x").mode == "RGB"
    except ImageError as error:
        assert error.image_id == "x" and error.reason


def test_an_image_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a/b.jpg", "it is empty")))  # noqa: S301 - our own bytes
    assert (error.image_id, error.reason) == ("a/b.jpg", "it is empty")
    assert str(error) == "image a/b.jpg can't be read: it is empty"


def test_warnings_of_pillow_alone_are_passed_over() -> None:
    """Also while a picture is read, so that readers in other threads cost nobody a warning."""
    picture = Image.new("RGB", (4, 4))
    exif = Image.Exif()
    exif[0x0112] = 1
    torn = saved(picture, "JPEG", exif=exif.tobytes()[:-6])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with decoded(torn, "x") as image:
            assert image.getexif().get(0x0112) is None
            warnings.warn("the user's own", stacklevel=1)
    assert [str(one.message) for one in found] == ["the user's own"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(torn, "x").size == (4, 4)
