"""safetensors files from outside: the header is checked against the file before anything is allocated.

Part of what :mod:`revelio.trust` is for: bounded, typed, and every error one line that names the file.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.trust import parse_json, printable, regular_file
from revelio.wording import plural

# A safetensors header: the format's own limit is 100 MB.
HEADER_LIMIT = 100_000_000

_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2}
_SIZES |= {"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
_TORCH = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32"}
_TORCH |= {"I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor: its dtype by the format's name, its shape and place.

    Attributes:
        dtype: by the format's name.
        shape: of the tensor.
        begin: the byte of the file that it begins at.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int


def tensor_headers(path: Path) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """The tensors and the metadata a safetensors file says it holds, checked against its size.

    Nothing of the tensors is read or allocated.

    Raises:
        ValueError: the header is no such header, or sizes, offsets and the file's length do not agree.
    """
    size = regular_file(path).stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise ValueError(f"{printable(path)} is cut, or is no safetensors file")
        raw = file.read(length)
    try:
        header = parse_json(raw.decode("utf-8"), printable(path))
        metadata = header.pop("__metadata__", {})
        tensors = {name: _tensor_header(entry, 8 + length) for name, entry in header.items()}
        ends = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        position = 0
        for begin, end in ends:
            if begin != position or end < begin:
                raise ValueError("its tensors overlap or leave gaps")
            position = end
        if position != size - 8 - length:
            raise ValueError(
                f"its tensors take {plural(position, 'byte')}, the file has {size - 8 - length:,}"
            )
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error).removeprefix(f"{printable(path)} ")
        raise ValueError(f"{printable(path)} is no whole safetensors file: {reason}") from error
    return tensors, metadata


def _tensor_header(entry: Mapping[str, Any], data: int) -> TensorHeader:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(side) is int and side >= 0 for side in (*shape, begin, end)):
        raise ValueError("a shape or an offset is not a number")
    count = _SIZES[dtype]
    for side in shape:
        count *= side
    if count != end - begin:
        raise ValueError(f"a tensor of {dtype} {shape} takes {plural(end - begin, 'byte')}")
    return TensorHeader(dtype, tuple(shape), data + begin)


def read_rows(path: Path, name: str, start: int, stop: int) -> Any:
    """Rows ``start:stop`` of one tensor of a safetensors file, as many of them as there are, by one read.

    Mapped, as safetensors reads, few rows come from the disk page by page, and count as held while they do.

    Raises:
        ValueError: the file is cut while it is read, or see :func:`tensor_headers`.
        KeyError: it holds no such tensor, or one of a number format that torch has no like of.
    """
    import torch

    header = tensor_headers(path)[0][name]
    dtype = getattr(torch, _TORCH[header.dtype])
    # A number alone is one row.
    count, *row = header.shape or (1,)
    start, stop, _ = slice(start, stop).indices(count)
    rows = torch.empty(max(0, stop - start), *row, dtype=dtype)
    raw = rows.flatten().view(torch.uint8).numpy().data
    with path.open("rb") as file:
        file.seek(header.begin + start * math.prod(row) * dtype.itemsize)
        if file.readinto(raw) != len(raw):
            raise ValueError(f"{printable(path)} is cut")
    return rows


def read_tensors(path: Path, shapes: Mapping[str, Sequence[int] | None]) -> dict[str, Any]:
    """Exactly the named tensors of a safetensors file, each of the given shape (None: any), finite.

    Raises:
        ValueError: names are missing or unexpected, a shape differs, a number is NaN or infinite, or see
            :func:`tensor_headers`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    headers, _ = tensor_headers(path)
    check_names(path, headers, shapes)
    for name, shape in shapes.items():
        if shape is not None and headers[name].shape != tuple(shape):
            raise ValueError(
                f"{printable(path)}: `{name}` has shape {headers[name].shape}, not {tuple(shape)}"
            )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{printable(path)} cannot be read: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{printable(path)}: `{name}` holds NaN or infinity")
    return tensors


def check_names(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the names of tensors.

    Raises:
        ValueError: some are missing or unexpected; the message names up to five of each.
    """
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"lacks {_some(missing)}")
        if unexpected:
            parts.append(f"has unexpected {_some(unexpected)}")
        raise ValueError(f"{printable(path)} {' and '.join(parts)}: it is another kind of model")


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
