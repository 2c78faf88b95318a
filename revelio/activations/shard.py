"""One shard of an activation store: a safetensors file with ``activations``, ``ids``, ``labels``.

The normative page is ``FORMAT.md`` in this folder. A shard is written whole and never edited.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from revelio.runs import write_whole

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


def decode_ids(coded: UInt8[Tensor, " bytes"]) -> list[str]:
    """The ids that :func:`encode_ids` wrote."""
    return json.loads(coded.numpy().tobytes().decode("ascii"))


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
        ValueError: the file is missing, cut, or no shard of this format.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})["revelio"])
            activations = file.get_slice("activations")
            shape = activations.get_shape()
            names = set(file.keys())
            dtype = _HEADER_DTYPES[activations.get_dtype()]
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: extract it again") from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is cut, or is no shard of an activation store: {error}"
        ) from error
    if notes.get("format") != FORMAT or not {"activations", "ids"} <= names:
        raise ValueError(
            f"{path} is a shard of format {notes.get('format')}; this version reads format {FORMAT}"
        )
    skipped = tuple((image_id, reason) for image_id, reason in notes["skipped"])
    return ShardHeader(shape[0], tuple(shape[1:]), dtype, "labels" in names, skipped)


def read_activations(path: Path, start: int, stop: int) -> Shaped[Tensor, "b ..."]:
    """Rows ``start:stop`` of a shard; only they are read from disk."""
    with safe_open(path, "pt") as file:
        return file.get_slice("activations")[start:stop]


def read_ids(path: Path) -> list[str]:
    """The ids of a shard's rows."""
    with safe_open(path, "pt") as file:
        return decode_ids(file.get_tensor("ids"))


def read_labels(path: Path) -> Int64[Tensor, " b"] | None:
    """The class ids of a shard's rows, or None where it has none."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118
