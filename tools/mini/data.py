"""Pictures for training and judging the mini models, held in memory as uint8 tensors.

Three sources: Fashion-MNIST (idx files, 28x28, padded to 32x32), Caltech-101 (a folder of class
folders with `train.txt` and `test.txt`; only the named split is read) and CIFAR-10 (one parquet
file of its training pictures).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from revelio.data.builtin import FASHION_CLASSES
from revelio.data.sources.idx import read_idx

BACKGROUND = "BACKGROUND_Google"
FASHION_FILES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class PictureSet:
    """Labelled pictures of one size.

    Attributes:
        name: Which data set, `fashion-mnist`, `caltech101` or `cifar10`.
        images: `(n, channels, side, side)` uint8, one channel where the source is grey.
        labels: `(n,)` int64, indices into `class_names`.
        class_names: The names the data set itself uses.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, rows: torch.Tensor) -> PictureSet:
        """The pictures of the given rows, in their order."""
        return PictureSet(self.name, self.images[rows], self.labels[rows], self.class_names)

    def to(self, device: torch.device) -> PictureSet:
        """The pictures and labels on a device."""
        images, labels = self.images.to(device), self.labels.to(device)
        return PictureSet(self.name, images, labels, self.class_names)


def load_fashion_mnist(folder: Path, split: str) -> PictureSet:
    """Fashion-MNIST, padded with black from 28x28 to 32x32, one channel.

    Args:
        folder: Where the four `*-ubyte.gz` files are.
        split: `train` (60,000) or `test` (10,000).
    """
    if split not in FASHION_FILES:
        raise ValueError(f"split {split!r} is not one of {sorted(FASHION_FILES)}")
    stem = FASHION_FILES[split]
    images = torch.from_numpy(read_idx(folder / f"{stem}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(folder / f"{stem}-labels-idx1-ubyte.gz").astype(np.int64))
    return PictureSet(
        "fashion-mnist", F.pad(images, (2, 2, 2, 2))[:, None], labels, FASHION_CLASSES
    )


def square(picture: Image.Image, side: int) -> np.ndarray:
    """Resize the shorter side to `side` and cut the middle square: `(side, side, 3)` uint8."""
    picture = picture.convert("RGB")
    scale = side / min(picture.size)
    size = tuple(max(side, round(length * scale)) for length in picture.size)
    picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def load_caltech101(folder: Path, split: str, side: int) -> PictureSet:
    """Caltech-101's 101 classes as middle squares, in alphabetical order, from `<split>.txt` only.

    The clutter class `BACKGROUND_Google` is no class of things and is left out.
    """
    listing = folder / f"{split}.txt"
    if not listing.is_file():
        raise ValueError(
            f"{listing} is missing: a folder with images/, train.txt and test.txt is wanted"
        )
    names = [n for n in listing.read_text().split() if n.endswith(".jpg") and BACKGROUND not in n]
    classes = tuple(sorted({name.split("/")[0] for name in names}))
    index = {name: i for i, name in enumerate(classes)}
    stack = np.stack([square(Image.open(folder / "images" / name), side) for name in names])
    labels = torch.tensor([index[name.split("/")[0]] for name in names])
    images = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()
    return PictureSet("caltech101", images, labels, classes)


def load_cifar10(file: Path) -> PictureSet:
    """CIFAR-10 pictures of one parquet file with the columns `image` and `label`, 32x32."""
    import datasets

    table = datasets.Dataset.from_parquet(str(file))
    assert isinstance(table, datasets.Dataset)
    images = np.stack([np.asarray(picture.convert("RGB")) for picture in table["image"]])
    names = tuple(table.features["label"].names)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return PictureSet("cifar10", tensor, torch.tensor(table["label"]), names)


def held_out_part(sets: list[PictureSet]) -> list[PictureSet]:
    """1,000 evenly spread pictures of the first set, what a training looks at for its log."""
    return [s.subset(torch.arange(0, len(s), max(1, len(s) // 1000))[:1000]) for s in sets[:1]]


def to_pixels(images: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 pictures of any size and one or three channels -> `(b, 3, side, side)` in [-1, 1]."""
    pixels = images.float().div_(127.5).sub_(1.0)
    if pixels.shape[-1] != side:
        pixels = F.interpolate(
            pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True
        )
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels


def random_flip(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each picture left to right with probability one half."""
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)


def random_view(
    images: torch.Tensor, side: int, smallest: float, generator: torch.Generator
) -> torch.Tensor:
    """A random square of each uint8 picture, mirrored half the time: `(b, 3, side, side)` in [-1, 1].

    Args:
        images: `(b, channels, s, s)` on any device.
        side: Of the result; bilinear.
        smallest: The smallest square's share of the picture's side.
        generator: Draws size, place and mirroring, of every picture its own.
    """
    pixels = to_pixels(images, images.shape[-1])
    drawn = torch.rand(4, len(images), generator=generator, device=generator.device)
    size, right, down, mirror = drawn.to(images.device)
    size = smallest + (1.0 - smallest) * size
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = torch.where(mirror < 0.5, -size, size)
    theta[:, 1, 1] = size
    theta[:, 0, 2] = (1.0 - size) * (2.0 * right - 1.0)
    theta[:, 1, 2] = (1.0 - size) * (2.0 * down - 1.0)
    # Places in half precision would be off by a tenth of a pixel.
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(theta, [len(images), 3, side, side], align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
