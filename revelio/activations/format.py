"""One shard of an activation store: a safetensors file with ``activations``, ``ids``, ``labels``.

The normative page is ``FORMAT.md`` in this folder. A shard is written whole and never edited.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, Shaped, UInt8
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from revelio.run_dir import write_whole
from revelio.trust import parse_json, regular_file, tensor_headers

FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HEADER_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Skipped = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself without its rows being read.

    Attributes:
        rows: how many rows it holds; 0 where every image of its range was skipped.
        row_shape: the shape of one row; meaningless for a shard of no rows.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        labelled: whether it has a label a row.
        skipped: id and reason of each image of its range that could not be read.
    """

    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    labelled: bool
    skipped: tuple[tuple[str, str], ...]


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
) -> Path:
    """Write shard ``number`` of the store in ``folder``, whole or not at all.

    Args:
        folder: the store's folder; made when missing.
        number: counted from 0.
        activations: one row an image, in float32, float16 or bfloat16.
        ids: one id a row.
        labels: one class id a row, or None.
        skipped: id and reason of each image of the shard's range that has no row.

    Raises:
        OSError: it can't be written, as on a full disk; nothing is left behind.
    """
    assert activations.dtype in DTYPES.values(), activations.dtype
    assert len(activations) == len(ids) and (labels is None or len(labels) == len(ids))
    tensors = {"activations": activations.cpu().contiguous(), "ids": encode_ids(ids)}
    if labels is not None:
        tensors["labels"] = torch.tensor(list(labels), dtype=torch.int64)
    # One key only: safetensors writes several in an order that changes from run to run.
    notes = json.dumps({"format": FORMAT, "skipped": [list(pair) for pair in skipped]})
    path = folder / shard_name(number)
    write_whole(path, save(tensors, {"revelio": notes}))
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
    if type(version) is not int or version != FORMAT:
        raise ValueError(f"{path} is a shard of another format; this version reads format {FORMAT}")
    activations, ids, labels = (tensors.get(name) for name in ("activations", "ids", "labels"))
    assert activations is not None and ids is not None
    rows = activations.shape[0] if activations.shape else -1
    if activations.dtype not in _HEADER_DTYPES or rows < 0:
        raise ValueError(f"{path}: `activations` is {activations.dtype} {activations.shape}")
    if ids.dtype != "U8" or len(ids.shape) != 1:
        raise ValueError(f"{path}: `ids` is {ids.dtype} {ids.shape}, not text as bytes")
    if labels is not None and (labels.dtype != "I64" or labels.shape != (rows,)):
        raise ValueError(
            f"{path}: `labels` is {labels.dtype} {labels.shape}, not one I64 for each of {rows} rows"
        )
    return ShardHeader(
        rows,
        activations.shape[1:],
        _HEADER_DTYPES[activations.dtype],
        labels is not None,
        _skipped(notes, path),
    )


def _skipped(notes: dict[str, Any], path: Path) -> tuple[tuple[str, str], ...]:
    pairs = notes.get("skipped")
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(word, str) for word in pair)
        for pair in pairs
    ):
        raise ValueError(f"{path}: `skipped` is no list of [id, reason]")
    return tuple((name, reason) for name, reason in pairs)


def check_names(path: Path, header: ShardHeader, classes: int, limit: int) -> None:
    """Compare a shard's ids and labels with its rows; its activations are not read.

    Args:
        path: the shard.
        header: what :func:`read_header` gave.
        classes: how many classes the store names; 0 for none.
        limit: labels stay below it where no classes are named.

    Raises:
        ValueError: the ids are not as many as the rows, or a label is no class id.
    """
    ids = read_ids(path)
    if len(ids) != header.rows:
        raise ValueError(f"{path} has {len(ids)} ids for {header.rows} rows: extract it again")
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
    """Rows ``start:stop`` of a shard; only they are read from disk."""
    with safe_open(path, "pt") as file:
        return file.get_slice("activations")[start:stop]


def read_ids(path: Path) -> list[str]:
    """The ids of a shard's rows.

    Raises:
        ValueError: they are no list of texts.
    """
    with safe_open(path, "pt") as file:
        return decode_ids(file.get_tensor("ids"), f"the ids of {path}")


def read_labels(path: Path) -> Int64[Tensor, " b"] | None:
    """The class ids of a shard's rows, or None where it has none."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118
