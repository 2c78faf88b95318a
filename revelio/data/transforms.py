"""Pictures to pixels: the square every backbone takes, and the augmented one Diff-C trains on.

Both do what torchvision's ``Resize`` + ``CenterCrop`` and ``RandomResizedCrop`` + ``RandomHorizontalFlip``
do on PIL images, with the same rounding, then (x / 255 - mean) / std; torchvision itself isn't needed.
Augmentation as in the paper's classifier: scale 0.8 to 1, ratio 3/4 to 4/3, flip 0.5 (SPEC: Diff-C, data).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor

Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
Offset = Literal["even", "down"]
RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10


@dataclass(frozen=True)
class Crop:
    """Which square of a picture a model sees: the middle ``size`` pixels of the picture, resized.

    Attributes:
        size: the side of the square, in pixels.
        resize: what the shorter side is resized to, in pixels.
        stretch: both sides are resized to it, whatever the picture's shape.
        offset: how half a pixel of the crop's offset is rounded; see :class:`SquareTransform`.
    """

    size: int
    resize: int
    stretch: bool = False
    offset: Offset = "even"

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> "Crop | None":
        """That of a store's manifest; None where it doesn't say, as those of older versions."""
        found = about.get("crop")
        return None if found is None else cls(**found)

    def place(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The width and height that a picture is resized to, then left and top of the square in it."""
        short, whole = min(width, height), round if self.offset == "even" else math.floor
        # The longer side is cut down to whole pixels.
        wide, high = (
            self.resize if self.stretch else int(self.resize * side / short)
            for side in (width, height)
        )
        left, top = (whole((side - self.size) / 2.0) for side in (wide, high))
        return wide, high, left, top

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the square in the picture's own pixels, which it may cut in parts."""
        wide, high, left, top = self.place(width, height)
        across, down = width / wide, height / high
        right, bottom = left + self.size, top + self.size
        return left * across, top * down, right * across, bottom * down

    def view(
        self, image: Image.Image, size: tuple[int, int], interpolation: Interpolation
    ) -> Image.Image:
        """What the model sees of a picture, ``size`` (width, height) large, from the picture's own pixels."""
        left, top, right, bottom = self.box(*image.size)
        x, y = math.floor(left), math.floor(top)
        # Cut first: outside the picture is black, where a box of `resize` may not reach.
        part = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
        box = (left - x, top - y, min(right - x, part.width), min(bottom - y, part.height))
        return part.resize(size, _filter(interpolation), box=box)


@dataclass(frozen=True)
class SquareTransform:
    """Resize the shorter side, cut the middle square of ``size``, normalise each channel.

    Attributes:
        size: the side of the square, in pixels.
        mean: subtracted from red, green and blue, on the scale 0 to 1.
        std: what the difference is divided by.
        interpolation: how pixels between pixels are found; wide enough not to alias when shrinking.
        offset: how half a pixel of the crop's offset is rounded: ``even`` is torchvision's rule, ``down``
            that of transformers' image processors.
        resize: what the shorter side is resized to, in pixels; None is ``size`` (DINOv2: 256 for 224).
        stretch: resize both sides to it, whatever the picture's shape, as ViT's and SigLIP's processors do.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bilinear"
    offset: Offset = "even"
    resize: int | None = None
    stretch: bool = False

    def __post_init__(self) -> None:
        _check(self.size, self.mean, self.std)

    def __repr__(self) -> str:
        # What was made with a transform names it by this: later fields show only where they are set.
        names = ["size", "mean", "std", "interpolation"]
        names += [name for name in ("resize", "stretch") if getattr(self, name)]
        return f"SquareTransform({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """The pixels of an RGB picture."""
        return _pixels(self.square(image), self.mean, self.std)

    @property
    def crop(self) -> Crop:
        """Which square of a picture it takes."""
        return Crop(self.size, self.resize or self.size, self.stretch, self.offset)

    def square(self, image: Image.Image) -> Image.Image:
        """The picture resized and cut, before normalization."""
        return center_square(
            image, self.size, self.interpolation, self.offset, self.resize, self.stretch
        )


@dataclass(frozen=True)
class RandomCropTransform:
    """Cut a random part of random shape, resize it to a square, mirror every second one, normalise.

    Attributes:
        size: the side of the square, in pixels.
        mean: subtracted from red, green and blue, on the scale 0 to 1.
        std: what the difference is divided by.
        scale: the least and greatest share of the picture's area to keep.
        interpolation: how pixels between pixels are found.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    scale: tuple[float, float] = (0.8, 1.0)
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        _check(self.size, self.mean, self.std)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}: give 0 < least <= greatest <= 1")

    def __call__(self, image: Image.Image, generator: Generator) -> Float[Tensor, "3 h w"]:
        """The pixels of a part of an RGB picture; all chance comes from ``generator``."""
        box = self._box(image.width, image.height, generator)
        # Cut first: resizing with a box would let pixels from outside it bleed in.
        part = image.crop(box).resize((self.size, self.size), _filter(self.interpolation))
        if torch.rand((), generator=generator) < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _pixels(part, self.mean, self.std)

    def _box(self, width: int, height: int, generator: Generator) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the part: area and log ratio uniform, place uniform."""
        for _ in range(_ATTEMPTS):
            area = width * height * _uniform(*self.scale, generator)
            ratio = math.exp(_uniform(math.log(RATIO[0]), math.log(RATIO[1]), generator))
            wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left = int(torch.randint(0, width - wide + 1, (), generator=generator))
                top = int(torch.randint(0, height - high + 1, (), generator=generator))
                return left, top, left + wide, top + high
        # Too long a picture: the middle of it, as near to square as the ratio allows.
        wide = min(width, round(height * RATIO[1]))
        high = min(height, round(width / RATIO[0]))
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high


def crop_of(transform: object) -> Crop | None:
    """Which square of a picture a model's transform takes; None where that is not known."""
    return transform.crop if isinstance(transform, SquareTransform) else None


def thumbnail(image: Image.Image, side: int, crop: Crop | None) -> Image.Image:
    """What a model sees of a picture, to be looked at; smaller pictures are not enlarged.

    Args:
        image: of any size.
        side: of the thumbnail at most, in pixels.
        crop: the model's; None: not known, the middle square.
    """
    image = image.convert("RGB")
    if crop is None:
        return center_square(image, min(side, *image.size), "bicubic")
    left, top, right, bottom = crop.box(*image.size)
    side = max(1, min(side, round(right - left), round(bottom - top)))
    return crop.view(image, (side, side), "bicubic")


def center_square(
    image: Image.Image,
    size: int,
    interpolation: Interpolation,
    offset: Offset = "even",
    resize: int | None = None,
    stretch: bool = False,
) -> Image.Image:
    """The middle ``size`` pixels of a resized picture; see :class:`SquareTransform`."""
    crop = Crop(size, resize or size, stretch, offset)
    width, height, left, top = crop.place(*image.size)
    resized = image.resize((width, height), _filter(interpolation))
    return resized.crop((left, top, left + size, top + size))


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _filter(name: Interpolation) -> Image.Resampling:
    return Image.Resampling[name.upper()]


def _pixels(
    image: Image.Image, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Tensor, "3 h w"]:
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return values.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def _check(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    if size < 1:
        raise ValueError(f"the image size is {size}: give a number of pixels, 1 or more")
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError(f"mean {mean} and std {std}: give three numbers each, std without zeros")
