"""``manifest.json`` of an activation store: what made it, and the sha256 of every shard.

The normative page is ``FORMAT.md`` in this folder. While a store is being written its settings lie
in ``unfinished.json``; the manifest comes last, once every shard is there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revelio.activations.shard import FORMAT, ShardHeader, read_header, shard_name
from revelio.runs import read_json, sha256, write_json

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"
# What a reader can't do without; the other fields tell where the rows came from.
REQUIRED = {
    "kind": str,
    "layer": str,
    "dtype": str,
    "row_shape": list,
    "rows": int,
    "labelled": bool,
    "classes": list,
    "skipped": list,
    "shards": list,
}


def write_manifest(folder: Path, settings: Mapping[str, Any], shards: int) -> dict[str, Any]:
    """Close the store in ``folder``: hash its shards ``0..shards-1`` and write the manifest.

    Args:
        folder: the store's folder, with every shard in place.
        settings: what made the rows; plain values, copied into the manifest.
        shards: how many shards there are.

    Raises:
        ValueError: a shard is missing, cut, or disagrees with another; or no image has a row.
    """
    paths = [folder / shard_name(number) for number in range(shards)]
    headers = [read_header(path) for path in paths]
    filled = [header for header in headers if header.rows]
    if not filled:
        raise ValueError(f"{folder}: not one image could be read, so there is nothing to store")
    for path, header in zip(paths, headers, strict=True):
        if header.rows and _kind(header) != _kind(filled[0]):
            raise ValueError(f"{path} differs from the shards before it: extract it again")
    manifest = {"format": FORMAT, "kind": "activations", "layer": folder.name, "classes": []}
    manifest |= dict(settings) | {
        "dtype": filled[0].dtype,
        "row_shape": list(filled[0].row_shape),
        "labelled": filled[0].labelled,
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
    write_json(folder / MANIFEST, manifest)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest


def _kind(header: ShardHeader) -> tuple[object, ...]:
    return header.row_shape, header.dtype, header.labelled


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a finished store.

    Raises:
        ValueError: there is none, it is of another format version, or it lacks a field.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(_why_no_manifest(folder))
    manifest = read_json(folder / MANIFEST)
    if isinstance(manifest, dict) and "format" not in manifest and "command" in manifest:
        raise ValueError(_why_no_manifest(folder))
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"{folder} is an activation store of format {version}; this version of Revelio reads "
            f"format {FORMAT}: extract it again, or read it with the version that wrote it"
        )
    for field, kind in REQUIRED.items():
        if not isinstance(manifest.get(field), kind):
            raise ValueError(
                f"{folder / MANIFEST} has no usable `{field}`: extract the store again"
            )
    return manifest


def _why_no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return f"no activation store at {folder}: make one with `revelio extract`"
    if (folder / UNFINISHED).exists():
        return f"{folder} is not finished: go on with the same `revelio extract` and --resume"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if inside:
        return f"{folder} holds several stores: name one of {', '.join(inside)} inside it"
    return f"{folder} holds no {MANIFEST}: it is no activation store"
