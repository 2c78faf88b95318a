"""``manifest.json`` of an activation store: what made it, and the sha256 of every shard.

The normative page is ``FORMAT.md`` in this folder. While a store is being written its settings lie
in ``unfinished.json``; the manifest comes last, once every shard is there.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from revelio.activations.format import (
    DTYPES,
    FORMATS,
    ShardHeader,
    check_names,
    read_header,
    shard_name,
)
from revelio.run_dir import sha256, write_json
from revelio.trust import file_in, printable, read_object, regular_file
from revelio.wording import plural

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
# Class ids of stores without class names stay below this: measures count up to the largest.
LABEL_LIMIT = 2**20
# How many times a model's square may be the resized picture that it is cut from.
MOST_BEYOND = 4
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it.

    Attributes:
        file: its name, always :func:`shard_name` of its place in the list.
        rows: how many rows it holds.
        bytes: the size of the file.
        sha256: of the file, in hexadecimal.
    """

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A manifest whose fields have the types and bounds of ``FORMAT.md``.

    Attributes:
        values: all fields as written, those that say what made the rows included.
        dtype: of the stored activations.
        row_shape: of one row.
        rows: over all shards.
        labelled: whether each row has a label.
        classes: class names by class id.
        skipped: id and reason of images without a row.
        shards: in order.
        cells: rows an image, where they are cells of its grid; else None: one.
        grid: height and width of the grids that the cells are of.
    """

    values: dict[str, Any]
    dtype: str
    row_shape: tuple[int, ...]
    rows: int
    labelled: bool
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    shards: tuple[ShardEntry, ...]
    cells: int | None = None
    grid: tuple[int, int] | None = None


def write_manifest(folder: Path, settings: Mapping[str, Any], shards: int) -> dict[str, Any]:
    """Close the store in ``folder``: hash its shards ``0..shards-1`` and write the manifest.

    Args:
        folder: the store's folder, with every shard in place.
        settings: what made the rows; plain values, copied into the manifest.
        shards: how many shards there are.

    Raises:
        ValueError: a shard is missing, cut, or disagrees with another; or no image has a row.
    """
    paths = [file_in(folder, shard_name(number), what="a shard") for number in range(shards)]
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        check_names(path, header, len(settings.get("classes", ())), LABEL_LIMIT)
    filled = [header for header in headers if header.rows]
    if not filled:
        raise ValueError(f"{folder}: not one image could be read, so there is nothing to store")
    for path, header in zip(paths, headers, strict=True):
        if header.rows and _kind(header) != _kind(filled[0]):
            raise ValueError(f"{path} differs from the shards before it: extract it again")
    first = filled[0]
    manifest = {"format": 1, "kind": "activations", "layer": folder.name, "classes": []}
    manifest |= dict(settings) | {
        "dtype": first.dtype,
        "row_shape": list(first.row_shape),
        "labelled": first.labelled,
        "rows": sum(header.rows for header in headers),
        "skipped": [list(pair) for header in headers for pair in header.skipped],
        "shards": [
            {
                "file": path.name,
                "rows": header.rows,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for path, header in zip(paths, headers, strict=True)
        ],
    }
    if first.cells is not None and first.grid is not None:
        manifest |= {"format": 2, "cells": first.cells, "grid": list(first.grid)}
    write_json(folder / MANIFEST, manifest)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _kind(header: ShardHeader) -> tuple[object, ...]:
    return header.row_shape, header.dtype, header.labelled, header.cells, header.grid


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a finished store; its shards are not looked at.

    Raises:
        ValueError: there is none, it is of another format version, or a field is missing, of another
            type, out of bounds, or at odds with another; the message names the file and the field.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(_why_no_manifest(folder))
    values = read_object(path)
    if "format" not in values and "command" in values:
        raise ValueError(_why_no_manifest(folder))
    version = values.get("format")
    if type(version) is not int or version not in FORMATS:
        raise ValueError(
            f"{path} is of format {printable(version)[:40]}; this version of Revelio reads formats "
            "1 and 2: extract the store again, or read it with the version that wrote it"
        )
    check_fields(path, values, _REQUIRED | (_OF_CELLS if version == 2 else {}), required=True)
    check_fields(path, values, MADE_BY, required=False)
    manifest = Manifest(
        values=values,
        dtype=values["dtype"],
        row_shape=tuple(values["row_shape"]),
        rows=values["rows"],
        labelled=values["labelled"],
        classes=tuple(values["classes"]),
        skipped=tuple((name, reason) for name, reason in values["skipped"]),
        shards=tuple(_entry(path, number, one) for number, one in enumerate(values["shards"])),
    )
    if version == 2:
        manifest = replace(manifest, cells=values["cells"], grid=tuple(values["grid"]))
    if sum(shard.rows for shard in manifest.shards) != manifest.rows:
        raise ValueError(
            f"{path}: the shards' row counts don't add up to {plural(manifest.rows, 'row')}"
        )
    return manifest


def shard_path(folder: Path, entry: ShardEntry) -> Path:
    """Where a shard lies, after a look at its size: always a file of its own in ``folder``.

    Raises:
        ValueError: it is missing, a link, no regular file, or of another size than when written.
    """
    path = file_in(folder, entry.file, what="a shard")
    if not path.exists():
        raise ValueError(f"{path} is missing: extract the store again")
    size = regular_file(path).stat().st_size
    if size != entry.bytes:
        raise ValueError(
            f"{path} was cut or edited: it has {plural(size, 'byte')}, {entry.bytes:,} when it was "
            "written: extract it again"
        )
    return path


def check_fields(
    path: Path, values: Mapping[str, Any], fields: "_Fields", *, required: bool
) -> None:
    """Compare fields with what ``FORMAT.md`` allows; fields it does not know are passed over.

    Args:
        path: the file they come from, for messages.
        values: the fields.
        fields: for each name what it must be, and a test.
        required: whether a missing field or null is an error.

    Raises:
        ValueError: a field is missing or something else.
    """
    for name, (wanted, test) in fields.items():
        value = values.get(name)
        if value is None and not required:
            continue
        if value is None or not test(value):
            shown = "" if value is None else f" but {printable(repr(value)[:60])}"
            raise ValueError(
                f"{path} has no usable `{name}`: it must be {wanted}{shown}: extract the store again"
            )


def _entry(path: Path, number: int, values: Mapping[str, Any]) -> ShardEntry:
    """Entry ``number`` of the manifest's list of shards."""
    fields = {
        "file": (f"{shard_name(number)} (shard {number})", lambda x: x == shard_name(number)),
        "rows": (f"the rows of shard {number}, 0 or more", _is_count),
        "bytes": (f"the size of shard {number}, 0 or more", _is_count),
        "sha256": (f"the hash of shard {number}, 64 hexadecimal digits", _is_hash),
    }
    check_fields(path, values, fields, required=True)
    return ShardEntry(values["file"], values["rows"], values["bytes"], values["sha256"])


def _is_count(value: Any) -> bool:
    # Rows, bytes and sides beyond 2^62 could not be added up in 64 bits.
    return type(value) is int and 0 <= value < 2**62


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_list(test: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and len(value) >= least and all(test(one) for one in value)
    )


def _is_pair(value: Any) -> bool:
    return _is_list(_is_text)(value) and len(value) == 2


def _is_side(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_crop(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"size", "resize", "stretch", "offset"}:
        return False
    size, resize = value["size"], value["resize"]
    # What is beyond the picture is made up when it is shown, and must not fill the memory.
    good = _is_side(size) and _is_side(resize) and size <= MOST_BEYOND * resize
    return good and isinstance(value["stretch"], bool) and value["offset"] in ("even", "down")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]
_TEXT = ("text", _is_text)
_COUNT = ("a whole number, 0 or more", _is_count)
_WHOLE = ("a whole number", _is_whole)

_REQUIRED: dict[str, Any] = {
    "kind": _TEXT,
    "layer": _TEXT,
    "dtype": (f"one of {', '.join(DTYPES)}", lambda x: isinstance(x, str) and x in DTYPES),
    "row_shape": ("a list of whole numbers above 0", _is_list(_is_side, 1)),
    "rows": _COUNT,
    "labelled": ("true or false", lambda x: isinstance(x, bool)),
    "classes": ("a list of names", _is_list(_is_text)),
    "skipped": ("a list of [id, reason]", _is_list(_is_pair)),
    "shards": ("a list of objects", _is_list(lambda x: isinstance(x, dict))),
}
_OF_CELLS: dict[str, Any] = {
    "cells": ("how many cells an image has, 1 or more", _is_side),
    "grid": ("two sides", lambda x: _is_list(_is_side, 2)(x) and len(x) == 2),
}
# What tells where the rows came from: null, absent or of these types.
MADE_BY: _Fields = {
    **dict.fromkeys(("model", "revision", "compute_dtype", "attention", "match_snr"), _TEXT),
    **dict.fromkeys(("prompt_policy", "mode", "dataset", "split", "dataset_sha256"), _TEXT),
    **dict.fromkeys(("contents_sha256", "captions_sha256"), _TEXT),
    **dict.fromkeys(("stride", "images", "batch_size", "shard_images"), _COUNT),
    **dict.fromkeys(("timestep", "seed"), _WHOLE),
    "draw": (
        "a whole number or a list of them",
        lambda x: _is_whole(x) or _is_list(_is_whole, 1)(x),
    ),
    "pool": ("mean, none or a side", lambda x: _is_side(x) or x in ("mean", "none")),
    "image_size": ("one or two sides", lambda x: _is_side(x) or _is_list(_is_side, 1)(x)),
    "crop": ("an object as in FORMAT.md", _is_crop),
    "made_with": ("an object", lambda x: isinstance(x, dict)),
    "probe": ("a list of numbers", _is_list(_is_number)),
}


def _why_no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return f"no activation store at {folder}: make one with `revelio extract`"
    if (folder / UNFINISHED).exists():
        return f"{folder} is not finished: go on with the same `revelio extract`, with resume"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if inside:
        return (
            f"{folder} holds several stores: name one of {printable(', '.join(inside))} inside it"
        )
    return f"{folder} holds no {MANIFEST}: it is no activation store"
