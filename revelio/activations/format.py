"""One shard of an activation store: a safetensors file with ``activations``, ``ids``, ``labels``.

The normative page is ``FORMAT.md`` in this folder. A shard is written whole and never edited.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int16, Int64, Shaped, UInt8
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from revelio.run_dir import write_whole
from revelio.tensor_files import read_rows, tensor_headers
from revelio.trust import parse_json, regular_file
from revelio.wording import plural

# Stores of cells are of format 2; all others stay of format 1, which older readers know.
FORMATS = (1, 2)
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,  # packed: numbers only to whom packed them
}
_HEADER_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}

Skipped = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself without its rows being read.

    Attributes:
        rows: how many rows it holds; 0 where every image of its range was skipped.
        row_shape: the shape of one row; meaningless for a shard of no rows.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        labelled: whether it has a label an image.
        skipped: id and reason of each image of its range that could not be read.
        cells: rows an image, where they are cells of its grid; else None: one.
        grid: height and width of the grids that the cells are of.
    """

    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    labelled: bool
    skipped: tuple[tuple[str, str], ...]
    cells: int | None = None
    grid: tuple[int, int] | None = None

    @property
    def images(self) -> int:
        """How many images its rows are of."""
        return self.rows // (self.cells or 1)


@dataclass(frozen=True)
class Cells:
    """Where rows that are cells of grids lie.

    Attributes:
        places: y and x of each row, the same number for each image, image by image.
        grid: height and width of the grids.
    """

    places: Int16[Tensor, "b 2"]
    grid: tuple[int, int]


def shard_name(number: int) -> str:
    """The file name of shard ``number``."""
    return f"shard-{number:05d}.safetensors"


def encode_ids(ids: Sequence[str]) -> UInt8[Tensor, " bytes"]:
    """Ids as the bytes of a JSON array in ASCII (so any text survives, even undecodable names)."""
    return torch.frombuffer(bytearray(json.dumps(list(ids)).encode("ascii")), dtype=torch.uint8)


def decode_ids(coded: UInt8[Tensor, " bytes"], where: str) -> list[str]:
    """The ids that :func:`encode_ids` wrote.

    Raises:
        ValueError: they are something else; the message names ``where``.
    """
    ids = parse_json(coded.numpy().tobytes().decode("ascii", "replace"), where)
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise ValueError(f"{where} are no list of texts")
    return ids


def write_shard(
    folder: Path,
    number: int,
    activations: Shaped[Tensor, "b ..."],
    ids: Sequence[str],
    labels: Sequence[int] | None = None,
    skipped: Skipped = (),
    cells: Cells | None = None,
) -> Path:
    """Write shard ``number`` of the store in ``folder``, whole or not at all.

    Args:
        folder: the store's folder; made when missing.
        number: counted from 0.
        activations: one row an image, in float32, float16, bfloat16 or packed bytes; or as many an image as
            it has cells.
        ids: one id an image.
        labels: one class id an image, or None.
        skipped: id and reason of each image of the shard's range that has no row.
        cells: where the rows lie, if they are cells.

    Raises:
        OSError: it can't be written, as on a full disk; nothing is left behind.
    """
    assert activations.dtype in DTYPES.values(), activations.dtype
    assert labels is None or len(labels) == len(ids)
    tensors = {"activations": activations.cpu().contiguous(), "ids": encode_ids(ids)}
    if labels is not None:
        tensors["labels"] = torch.tensor(list(labels), dtype=torch.int64)
    notes: dict[str, Any] = {"format": 1, "skipped": [list(pair) for pair in skipped]}
    each = 1
    if cells is not None and ids:
        each = len(activations) // len(ids)
        tensors["cells"] = cells.places.contiguous()
        notes |= {"format": 2, "cells": each, "grid": list(cells.grid)}
    assert len(activations) == each * len(ids)
    path = folder / shard_name(number)
    # One key only: safetensors writes several in an order that changes from run to run.
    write_whole(path, save(tensors, {"revelio": json.dumps(notes)}))
    return path


def read_header(path: Path) -> ShardHeader:
    """Read what a shard says of itself; a file that is cut does not get through.

    Raises:
        ValueError: the file is missing, cut, no shard of this format, or its tensors have not the types
            and shapes of ``FORMAT.md``.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: extract it again")
    tensors, metadata = tensor_headers(regular_file(path))
    if "revelio" not in metadata or not {"activations", "ids"} <= tensors.keys():
        raise ValueError(f"{path} is no shard of an activation store: extract it again")
    notes = parse_json(metadata["revelio"], f"the `revelio` entry of {path}")
    version = notes.get("format") if isinstance(notes, dict) else None
    if type(version) is not int or version not in FORMATS:
        raise ValueError(f"{path} is a shard of another format; this version reads formats 1 and 2")
    activations, ids, labels = (tensors.get(name) for name in ("activations", "ids", "labels"))
    assert activations is not None and ids is not None
    rows = activations.shape[0] if activations.shape else -1
    if activations.dtype not in _HEADER_DTYPES or rows < 0:
        raise ValueError(f"{path}: `activations` is {activations.dtype} {activations.shape}")
    if ids.dtype != "U8" or len(ids.shape) != 1:
        raise ValueError(f"{path}: `ids` is {ids.dtype} {ids.shape}, not text as bytes")
    header = ShardHeader(
        rows,
        activations.shape[1:],
        _HEADER_DTYPES[activations.dtype],
        labels is not None,
        _skipped(notes, path),
    )
    if version == 2:
        header = _with_cells(path, header, notes, tensors.get("cells"))
    if labels is not None and (labels.dtype != "I64" or labels.shape != (header.images,)):
        raise ValueError(
            f"{path}: `labels` is {labels.dtype} {labels.shape}, not one I64 for each of "
            f"{plural(header.images, 'image')}"
        )
    return header


def _with_cells(path: Path, header: ShardHeader, notes: dict[str, Any], cells: Any) -> ShardHeader:
    """What a shard of format 2 says of its cells."""
    each, grid = notes.get("cells"), notes.get("grid")
    sizes = [each, *grid] if isinstance(grid, list) else []
    if len(sizes) != 3 or any(type(n) is not int or not 0 < n < 2**15 for n in sizes):
        raise ValueError(f"{path}: `cells` and `grid` are no sizes of grids: extract it again")
    each, height, width = sizes
    if cells is None or cells.dtype != "I16" or cells.shape != (header.rows, 2):
        raise ValueError(
            f"{path}: `cells` is not one I16 (y, x) for each of {plural(header.rows, 'row')}"
        )
    if header.rows % each or each > height * width:
        raise ValueError(
            f"{path}: {plural(header.rows, 'row is', 'rows are')} not {plural(each, 'cell')} an image"
        )
    return replace(header, cells=each, grid=(height, width))


def _skipped(notes: dict[str, Any], path: Path) -> tuple[tuple[str, str], ...]:
    pairs = notes.get("skipped")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair)
        for pair in pairs
    ):
        raise ValueError(f"{path}: `skipped` is no list of [id, reason]")
    return tuple((name, reason) for name, reason in pairs)


def check_names(path: Path, header: ShardHeader, classes: int, limit: int) -> None:
    """Compare a shard's ids, labels and cells with its rows; its activations are not read.

    Args:
        path: the shard.
        header: what :func:`read_header` gave.
        classes: how many classes the store names; 0 for none.
        limit: labels stay below it where no classes are named.

    Raises:
        ValueError: the ids are not as many as the images, or a label is no class id, or a cell lies outside.
    """
    ids = read_ids(path)
    if len(ids) != header.images:
        raise ValueError(
            f"{path} has {plural(len(ids), 'id')} for {plural(header.images, 'image')}: extract it again"
        )
    if header.grid is not None and header.rows:
        places = read_places(path, 0, header.rows)
        if int(places.min()) < 0 or (places >= torch.tensor(header.grid)).any():
            raise ValueError(f"{path} has cells outside its grid {header.grid}: extract it again")
    labels = read_labels(path)
    if labels is None or not len(labels):
        return
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= (classes or limit):
        raise ValueError(
            f"{path} has labels from {least} to {most}: class ids go from 0 to "
            f"{(classes or limit) - 1}: extract it again"
        )


def read_activations(path: Path, start: int, stop: int) -> Shaped[Tensor, "b ..."]:
    """Rows ``start:stop`` of a shard, as many of them as there are; only they are read from disk.

    Raises:
        ValueError: it is no whole shard.
    """
    return read_rows(path, "activations", start, stop)


def read_places(path: Path, start: int, stop: int) -> Int16[Tensor, "b 2"]:
    """Where rows ``start:stop`` of a shard of cells lie: y, x."""
    return read_rows(path, "cells", start, stop)


def read_ids(path: Path) -> list[str]:
    """The ids of a shard's images.

    Raises:
        ValueError: they are no list of texts.
    """
    with safe_open(path, "pt") as file:
        return decode_ids(file.get_tensor("ids"), f"the ids of {path}")


def read_labels(path: Path) -> Int64[Tensor, " b"] | None:
    """The class ids of a shard's images, or None where it has none."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118
