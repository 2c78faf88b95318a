"""Pictures on their way to the towers: read, named by content, padded to a square.

A picture in a data set is known by name, size and what it holds:

    cat.jpg|48213|3f0c...      the file's name, its bytes, a hash of them (revelio.data.contents)

Hashes are read once: ``pictures.json`` in a run or a cache keeps each with the size and the time of change of
its file, and a file that still has both is not read again. Only pictures that could be decoded get there.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from llava_ext.config import Aspect
from revelio.config import structure
from revelio.data.contents import digest_of, digests
from revelio.data.dataset import ImageError
from revelio.data.picture import as_rgb, read_picture
from revelio.data.transforms import SquareTransform
from revelio.distributed import is_main, local_world_size
from revelio.files import write_whole
from revelio.seeds import generator
from revelio.trust import read_object

STAMPS, PICTURES = "pictures.json", "pictures"
NAME_BYTES = 16  # of an image_id
EXACT_ID = re.compile(r"(.*)\|[0-9]+\|(?:[0-9a-f]{32}|unreadable)", re.S)
MANY = 1000  # pictures whose decoding takes long enough for a bar


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
    picture = as_rgb(image)
    digest = hashlib.blake2b(f"{picture.width}x{picture.height}:".encode(), digest_size=NAME_BYTES)
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
    coarse = torch.randint(
        0, 256, (6, 9, 3), generator=generator("smooth picture"), dtype=torch.uint8
    )
    image = Image.fromarray(np.asarray(coarse))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def plain_ids(folder: Path, names: Sequence[str]) -> list[str]:
    """Ids as the first version made them, of name and size only: an edit of equal size is not seen."""
    return [f"{name}|{(folder / name).stat().st_size}" for name in names]


def name_of(identity: str) -> str:
    """The file's name in an id of either kind; it may hold the ids' own mark."""
    exact = EXACT_ID.fullmatch(identity)
    return exact[1] if exact else identity.rpartition("|")[0]


def picture_ids(
    folder: Path, names: Sequence[str], cache: Path, *, keep: bool = False
) -> list[str]:
    """Ids of pictures.

    Args:
        folder: of the pictures.
        names: their files.
        cache: the folder whose ``pictures.json`` holds hashes that were read before.
        keep: write that file, where a picture had to be read, unless another file has its name.
    """
    stamps = read_stamps(cache / STAMPS, PICTURES)
    keep = keep and (bool(stamps) or not (cache / STAMPS).exists())
    now = [size_and_time(folder / name) for name in names]
    known = [stamps.get(name, [])[:2] == stamp for name, stamp in zip(names, now, strict=True)]
    unread = [number for number, is_known in enumerate(known) if not is_known]
    found = digests(lambda place: digest_of(folder / names[unread[place]]), len(unread))
    for number, digest in zip(unread, found, strict=True):
        stamps[names[number]] = [*now[number], digest]
    if keep and unread:
        write_stamps(cache / STAMPS, PICTURES, stamps)
    return [f"{name}|{stamps[name][0]}|{stamps[name][2]}" for name in names]


def damaged(folder: Path, names: Sequence[str], cache: Path) -> dict[str, str]:
    """Decode pictures, in several threads, under a bar.

    Args:
        folder: of the pictures.
        names: their files.
        cache: the run or cache whose ``pictures.json`` names those that were decoded before.

    Returns:
        Why each that can't be used can't.
    """
    from tqdm import tqdm

    stamps = read_stamps(cache / STAMPS, PICTURES)
    names = [name for name in dict.fromkeys(names) if not _is_known(stamps, folder, name)]
    threads = max(1, (os.cpu_count() or 1) // local_world_size())
    with ThreadPoolExecutor(threads) as pool:
        looked = pool.map(lambda name: _reason(folder, name), names)
        quiet = len(names) < MANY or not is_main()
        bar = tqdm(looked, "pictures", len(names), disable=quiet, leave=False)
        return {name: reason for name, reason in zip(names, bar, strict=True) if reason}


def _reason(folder: Path, name: str) -> str | None:
    """Why a picture can't be used."""
    if not (folder / name).is_file():
        return f"no image {name} in {folder}"
    try:
        open_picture(folder / name)
    except ValueError as error:
        return str(error)
    return None


def _is_known(stamps: Mapping[str, Sequence[Any]], folder: Path, name: str) -> bool:
    """Whether the picture was decoded before, and has not changed since."""
    with suppress(OSError):
        return name in stamps and stamps[name][:2] == size_and_time(folder / name)
    return False


def size_and_time(path: Path) -> list[int]:
    """Bytes of a file and its time of change in nanoseconds."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def read_stamps(path: Path, kind: str) -> dict[str, list[Any]]:
    """Size, time of change and hash of files, by name, as they were read before.

    Nothing where the file of stamps is missing or damaged: files are read again.
    """
    with suppress(ValueError):
        found = read_object(path).get(kind)
        if isinstance(found, dict) and all(_is_stamp(stamp) for stamp in found.values()):
            return found
    return {}


def write_stamps(path: Path, kind: str, stamps: Mapping[str, Sequence[Any]]) -> None:
    """Keep them for the next start."""
    write_whole(path, json.dumps({"format": 1, kind: stamps}))


def _is_stamp(value: Any) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [int, int, str]


def transform_from(entry: Mapping[str, Any]) -> SquareTransform:
    """A tower's transform from its plain values in a saved model's config.

    Raises:
        ValueError: a value is unknown or of another kind.
    """
    return structure(SquareTransform, entry, where="transforms.")


def join_pixels(
    picture: Image.Image, transforms: Sequence[Mapping[str, Any]], aspect: Aspect = "crop"
) -> UInt8[Tensor, " n"]:
    """What every tower sees of an RGB picture, one behind the other, not normalised."""
    squares = []
    for transform in map(transform_from, transforms):
        whole = pad_to_square(picture, transform.mean) if aspect == "pad" else picture
        squares.append(np.asarray(transform.square(whole)).transpose(2, 0, 1).ravel())
    return torch.from_numpy(np.concatenate(squares))


def split_pixels(
    pixel_values: UInt8[Tensor, "i n"], transforms: Sequence[Mapping[str, Any]]
) -> list[Float[Tensor, "i 3 h w"]]:
    """Each tower's pixels of :func:`join_pixels`, normalised as its own transform does it."""
    all_of = [transform_from(entry) for entry in transforms]
    parts = pixel_values.split([3 * each.size**2 for each in all_of], dim=1)
    found = []
    for part, transform in zip(parts, all_of, strict=True):
        pixels = part.view(-1, 3, transform.size, transform.size).float().div_(255)
        mean, std = (torch.tensor(v, device=pixels.device) for v in (transform.mean, transform.std))
        found.append(pixels.sub_(mean[:, None, None]).div_(std[:, None, None]))
    return found


def id_of(name: str) -> list[int]:
    """An :func:`image_id` as two signed numbers, which a tensor can hold."""
    return np.frombuffer(bytes.fromhex(name), dtype="<i8").tolist()


def names_of(ids: Int64[Tensor, "i 2"]) -> list[str]:
    """The image ids that :func:`id_of` made numbers of."""
    return [row.astype("<i8").tobytes().hex() for row in ids.cpu().numpy()]
