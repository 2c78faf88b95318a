"""Pictures on their way to the towers: read, named by content, padded to a square."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from revelio.data.dataset import ImageError
from revelio.data.picture import read_picture
from revelio.seeds import generator


def open_picture(path: Path) -> Image.Image:
    """A picture file as 8-bit RGB.

    Raises:
        ValueError: there is none, or it can't be read; one line that names it.
    """
    if not path.is_file():
        raise ValueError(f"no image at {path}: give a picture file")
    try:
        return read_picture(path, str(path))
    except ImageError as error:
        raise ValueError(str(error)) from error


def image_id(image: Image.Image) -> str:
    """A name made of what is to be seen: equal pixels, equal name, whatever the file.

    It keys a diffusion tower's noise, so that an answer at temperature 0 never changes.
    """
    picture = image.convert("RGB")
    digest = hashlib.blake2b(f"{picture.width}x{picture.height}:".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def pad_to_square(image: Image.Image, colour: tuple[float, float, float]) -> Image.Image:
    """The whole picture in the middle of a square of one colour.

    Args:
        image: an RGB picture.
        colour: red, green and blue on the scale 0 to 1.
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in colour))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def smooth_picture(width: int, height: int) -> Image.Image:
    """A picture of smooth colours in which every place looks different; always the same."""
    import torch

    coarse = torch.randint(
        0, 256, (6, 9, 3), generator=generator("smooth picture"), dtype=torch.uint8
    )
    image = Image.fromarray(np.asarray(coarse))
    return image.resize((width, height), Image.Resampling.BICUBIC)
