"""Small pictures and folders of them, and torchvision's transforms written out in plain numpy."""

import math
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture of independent random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(image: Image.Image, **options: object) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def write_class_folders(root: Path, counts: dict[str, int], size: int = 8) -> None:
    """``root/<class>/<number>.png``; the red of every pixel is the class's place, green the number."""
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            colour = (place, number, 0)
            Image.new("RGB", (size, size), colour).save(root / name / f"{number}.png")


def resize_matrix(length: int, new: int) -> np.ndarray:
    """Row i: the weights of the old pixels in new pixel i (triangle filter, widened when shrinking)."""
    scale = length / new
    support = max(scale, 1.0)
    matrix = np.zeros((new, length))
    for i in range(new):
        centre = (i + 0.5) * scale
        for j in range(length):
            matrix[i, j] = max(0.0, 1 - abs((j + 0.5 - centre) / support))
        matrix[i] /= matrix[i].sum()
    return matrix


def square_by_formula(values: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side to ``size`` (longer side cut to whole pixels), cut the centre."""
    height, width, _ = values.shape
    if height <= width:
        new_height, new_width = size, math.floor(size * width / height)
    else:
        new_height, new_width = math.floor(size * height / width), size
    rows, columns = resize_matrix(height, new_height), resize_matrix(width, new_width)
    resized = np.einsum("ih,jw,hwc->ijc", rows, columns, values.astype(float))
    top, left = round((new_height - size) / 2.0), round((new_width - size) / 2.0)
    return resized[top : top + size, left : left + size]


def blank_png(width: int, height: int) -> bytes:
    """A PNG of one grey, written by hand: of a few kilobytes, whatever its size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    packer = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
