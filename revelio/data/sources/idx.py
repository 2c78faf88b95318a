"""Pictures in gzipped idx files, the format of MNIST and Fashion-MNIST: 8-bit grey arrays."""

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from revelio.data.contents import digest_of
from revelio.data.dataset import ImageDataset
from revelio.data.splits import ALL, choose_split
from revelio.trust import regular_file
from revelio.wording import plural

# Deflate makes at most 1032 bytes of one.
MOST_UNPACKED = 1040
_STEMS = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class ArrayReader:
    """Reads the picture of an index from an array (images, height, width) of 8-bit grey."""

    pictures: np.ndarray

    def __call__(self, index: int) -> Image.Image:
        """The picture at ``index``, grey as RGB."""
        return Image.fromarray(self.pictures[index]).convert("RGB")

    def digest(self, index: int) -> str:
        """The hash of the pixels at ``index``."""
        return digest_of(self.pictures[index].tobytes())


def has_idx(folder: Path) -> bool:
    """Whether ``folder`` holds pictures as idx files."""
    return any((folder / _file(stem, "images", 3)).is_file() for stem in _STEMS.values())


def open_idx(folder: Path, *, split: str | None, name: str, classes: Sequence[str]) -> ImageDataset:
    """Open ``train-images-idx3-ubyte.gz`` and its fellows; ids are ``<split>/<row>``.

    Raises:
        ValueError: no such split, a file that is cut or no idx file, or an unknown class id.
    """
    there = [s for s, stem in _STEMS.items() if (folder / _file(stem, "images", 3)).is_file()]
    chosen = choose_split(there, split, str(folder))
    keys = there if chosen in (None, ALL) else [chosen]
    pictures = [read_idx(folder / _file(_STEMS[key], "images", 3)) for key in keys]
    labels = [read_idx(folder / _file(_STEMS[key], "labels", 1)) for key in keys]
    for key, some, own in zip(keys, pictures, labels, strict=True):
        if some.ndim != 3 or own.shape != some.shape[:1] or own.max(initial=0) >= len(classes):
            raise ValueError(
                f"{folder}: the {key} labels (shape {own.shape}, up to {own.max(initial=0)}) don't fit "
                f"pictures of shape {some.shape} in {plural(len(classes), 'class', 'classes')}"
            )
    return ImageDataset(
        name=name,
        split=chosen,
        classes=tuple(classes),
        ids=[
            f"{key}/{row}" for key, own in zip(keys, labels, strict=True) for row in range(len(own))
        ],
        labels=[int(label) for own in labels for label in own],
        read=(reader := ArrayReader(np.concatenate(pictures))),
        digest=reader.digest,
    )


def read_idx(path: Path) -> np.ndarray:
    """The array of one gzipped idx file of unsigned bytes.

    Raises:
        ValueError: it is not there, no such file, or cut short; the message names it.
    """
    try:
        # What the header states is read and no more: a few kilobytes can unpack to any size.
        most = MOST_UNPACKED * regular_file(path).stat().st_size
        with gzip.open(path, "rb") as file:
            head = file.read(4)
            sides = file.read(4 * head[3]) if len(head) == 4 and head[3] <= 8 else b""
            if head[:3] != b"\x00\x00\x08" or len(sides) != 4 * head[3]:
                raise ValueError(f"{path} is no idx file of unsigned bytes")
            shape = tuple(int(side) for side in np.frombuffer(sides, dtype=">u4"))
            size = math.prod(shape)
            content = file.read(min(size, most) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read as a gzipped idx file: {error}") from error
    if len(content) != size:
        found = f"{len(content)}" if len(content) < size else f"more than {size}"
        raise ValueError(f"{path} is cut: {found} bytes of pixels where {shape} are stated")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _file(stem: str, what: str, rank: int) -> str:
    return f"{stem}-{what}-idx{rank}-ubyte.gz"
