"""Views of a live source computed once, then kept in memory or in a file.

A view of N images is one tensor (N c h w) in half precision: 9.7 GB for 3,680 images at up_ft1 of SD-1.5
at 512 px. What would not fit in memory goes to memory-mapped files, one a view, each written under a
temporary name of its writer's own (runs may share a folder) and renamed when whole, so that a killed run goes
on at the first missing view. Beside each
lies a JSON file with its size and sha256; a view that does not agree with it is computed again. Files are
named after all that the grids depend on, the contents of the pictures included.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revelio.diffc.shared import Share
from revelio.diffc.sources import GridSource, TensorGrids, chunks
from revelio.disk import reserve
from revelio.files import make_folder, partial_path, remove_files, sweep
from revelio.run_dir import sha256, write_json
from revelio.trust import read_object

GB = 1e9
# The second half are those that are not whole yet (`partial_path`).
_VIEW = re.compile(
    r"[0-9a-f]{16}-v\d+\.(bin|json|partial)|\.[0-9a-f]{16}-v\d+\.(bin|json)\.[0-9a-f-]+\.partial"
)
CAST_TOLERANCE = 1e-2  # of half precision against float32, relative to a view's largest value


@dataclass(frozen=True)
class CacheSettings:
    """How views are kept.

    Attributes:
        views: how many augmented views beside the plain one.
        dtype: number format of the kept grids.
        memory_gb: total size up to which they stay in memory.
        batch_size: images a pass of the backbone.
        folder: where the files go when they don't.
        key: what the grids depend on; a file made by other settings is not taken for this one.
    """

    views: int
    dtype: torch.dtype
    memory_gb: float
    batch_size: int
    folder: Path
    key: dict[str, Any]

    def gigabytes(self, source: GridSource) -> float:
        """Size of all views of a source."""
        return (1 + self.views) * _bytes(source, self.dtype) / GB


@dataclass
class Filled:
    """Progress: how many more images of a view are done; the whole cache at the end."""

    images: int
    grids: TensorGrids | None = None


def fill_cache(
    source: GridSource, settings: CacheSettings, share: Share | None = None
) -> Iterator[Filled]:
    """Compute every view of every image; yields after each batch, at last with the result.

    Args:
        source: makes the grids.
        settings: how they are kept.
        share: makes only this process's views, and files of them; there is no result then.

    Raises:
        ValueError: a grid has values that the number format can't hold.
    """
    in_memory = share is None and settings.gigabytes(source) <= settings.memory_gb
    views = []
    for view in range(1 + settings.views):
        if share is not None and view % share.world != share.rank:
            continue
        path = None if in_memory else settings.folder / f"{_name(source, settings)}-v{view}.bin"
        if path is not None and _is_whole(path, source, settings.dtype):
            views.append(_map(path, source, settings.dtype))
            yield Filled(len(source.ids))
            continue
        yield from _fill_view(source, view, settings, path, views)
    if share is None:
        yield Filled(0, TensorGrids(views, source.labels, source.ids, source.contents))


def bytes_left(source: GridSource, settings: CacheSettings) -> int:
    """What the files that are not there yet will take."""
    size, name = _bytes(source, settings.dtype), _name(source, settings)
    paths = (settings.folder / f"{name}-v{view}.bin" for view in range(1 + settings.views))
    return sum(size for path in paths if not (path.is_file() and path.stat().st_size == size))


def drop_cache(folder: Path) -> None:
    """Remove the views that :func:`fill_cache` left in files there, and nothing else."""
    remove_files(folder, _VIEW.fullmatch)


def _fill_view(
    source: GridSource, view: int, settings: CacheSettings, path: Path | None, views: list[Tensor]
) -> Iterator[Filled]:
    if path is None:
        kept = torch.empty((len(source.ids), *source.shape), dtype=settings.dtype)
        yield from _compute(source, view, settings, kept)
        views.append(kept)
        return
    make_folder(path.parent)
    sweep(path.parent, dead=True)
    partial = partial_path(path)
    try:
        # A mapped file that outgrows the disk would end the process without a word.
        reserve(partial, _bytes(source, settings.dtype))
        kept = _map(partial, source, settings.dtype)
        yield from _compute(source, view, settings, kept)
        # What the file is must be there first: without it a view is computed again.
        write_json(_notes(path), {"bytes": partial.stat().st_size, "sha256": sha256(partial)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    views.append(kept)


def _compute(
    source: GridSource, view: int, settings: CacheSettings, kept: Tensor
) -> Iterator[Filled]:
    for indices in chunks(range(len(source.ids)), settings.batch_size):
        grids = source.grids(indices, view).cpu()
        kept[indices[0] : indices[-1] + 1] = _cast(grids, settings.dtype)
        yield Filled(len(indices))


def _cast(grids: Tensor, dtype: torch.dtype) -> Tensor:
    cast = grids.to(dtype)
    error = (cast.float() - grids).abs().max() / grids.abs().max().clamp_min(1e-12)
    if not error <= CAST_TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} can't hold these grids (largest value {grids.abs().max():.3g}, error "
            f"{error:.3g} of it): keep them as float32 or bfloat16 (cache_dtype)"
        )
    return cast


def _is_whole(path: Path, source: GridSource, dtype: torch.dtype) -> bool:
    """Whether a view's file is as it was written, by size and hash."""
    size, notes = _bytes(source, dtype), _notes(path)
    if (
        not path.is_file()
        or path.is_symlink()
        or path.stat().st_size != size
        or not notes.is_file()
    ):
        return False
    try:
        return read_object(notes) == {"bytes": size, "sha256": sha256(path)}
    except ValueError:
        return False


def _notes(path: Path) -> Path:
    return path.with_suffix(".json")


def _bytes(source: GridSource, dtype: torch.dtype) -> int:
    return len(source.ids) * math.prod(source.shape) * dtype.itemsize


def _map(path: Path, source: GridSource, dtype: torch.dtype) -> Tensor:
    shape = (len(source.ids), *source.shape)
    size = math.prod(shape)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def _name(source: GridSource, settings: CacheSettings) -> str:
    key = [
        settings.key,
        str(settings.dtype),
        list(source.shape),
        list(source.ids),
        list(source.labels),
        source.contents,
    ]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
