"""Reading an activation store: rows, ids and labels in the order of the data set.

A store holds one row an image, a vector or a grid; or, where it was asked for when it was opened, some cells
of each image's grid, a row each.

Rows are read from disk when they are asked for, so a store may be far larger than memory. Manifest, sizes,
tensor headers, ids and labels are checked when the store is opened, which reads no activations; a shard's
sha256 before the first of its rows is given out.
Writing is :func:`write_shard` for each shard, then :func:`write_manifest`; ``FORMAT.md`` is normative.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float32, Int16, Int64, Shaped
from torch import Tensor

from revelio.activations.format import (
    DTYPES,
    Cells,
    Skipped,
    check_names,
    read_activations,
    read_header,
    read_ids,
    read_labels,
    read_places,
    write_shard,
)
from revelio.activations.manifest import (
    LABEL_LIMIT,
    Manifest,
    read_manifest,
    shard_path,
    write_manifest,
)
from revelio.run_dir import sha256
from revelio.wording import plural

# What to do about a store of cells: where what a row is can be chosen, and where whole grids are needed.
ONE_ROW = (
    "choose rows that are cells where there is that choice, or extract the images without `cells`"
)
WHOLE_GRIDS = "extract whole grids (pool none, without `cells`)"

__all__ = ["ActivationStore", "write_manifest", "write_shard", "write_store"]


class ActivationStore:
    """A finished store, opened for reading with :meth:`open`.

    Attributes:
        path: the store's folder.
        manifest: what made it; the fields are those of ``FORMAT.md``.
        classes: class names by class id; empty where the images have no labels.
        row_shape: ``(d,)`` for pooled activations and cells, ``(c, h, w)`` for grids.
        cells: rows an image, where they are cells of its grid; else None: one.
        grid: height and width of the grids that the cells are of.
    """

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self.path = path
        self.manifest = manifest.values
        self.classes = manifest.classes
        self.row_shape = manifest.row_shape
        self.cells, self.grid = manifest.cells, manifest.grid
        self._checked = manifest
        self._shards = manifest.shards
        self._stops = list(accumulate(shard.rows for shard in self._shards))
        self._unchecked = set(range(len(self._shards))) if verify else set()

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        verify: bool = True,
        cells: bool = False,
        packed: bool = False,
        instead: str = ONE_ROW,
    ) -> "ActivationStore":
        """Open the store in folder ``path``.

        Args:
            path: the folder with ``manifest.json``.
            verify: check each shard's sha256 before its first rows are given out.
            cells: whether the store may hold cells, several rows an image.
            packed: whether its rows may be bytes that only their writer can unpack.
            instead: what to do about a store of cells where there may be none.

        Raises:
            ValueError: no finished store is there, it holds cells and may not, it is of another format
                version, or its manifest or a shard is not as ``FORMAT.md`` says; the file is named.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        store = cls(folder, manifest, verify=verify)
        if store.cells is not None and not cells:
            raise ValueError(
                f"{folder} holds {plural(store.cells, 'cell')} of each image's grid, and this takes one row "
                f"an image: {instead}"
            )
        if manifest.dtype == "uint8" and not packed:
            raise ValueError(
                f"{folder} holds packed bytes, no activations: it is a tower's cache (`revelio llava cache`) "
                "whose `keep` is not grids"
            )
        for number in range(len(store._shards)):
            store._check(number)
        return store

    @property
    def sha256(self) -> str:
        """One hash for all rows, ids and labels: of the shards' sha256, one a line."""
        return hashlib.sha256(
            "\n".join(shard.sha256 for shard in self._shards).encode()
        ).hexdigest()

    @property
    def bytes(self) -> int:
        """The size of its shards on disk."""
        return sum(shard.bytes for shard in self._shards)

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    @property
    def images(self) -> int:
        """How many images the rows are of."""
        return len(self) // (self.cells or 1)

    def verify(self) -> None:
        """Check the sha256 of every shard now.

        Raises:
            ValueError: a shard was cut or edited; it is named.
        """
        self._unchecked = set(range(len(self._shards)))
        for number in range(len(self._shards)):
            self._path(number)

    @cached_property
    def ids(self) -> list[str]:
        """One id an image."""
        return [
            name for number in range(len(self._shards)) for name in read_ids(self._path(number))
        ]

    @cached_property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """One class id an image, or None where the images have no labels."""
        if not self._checked.labelled:
            return None
        parts = [read_labels(self._path(number)) for number in range(len(self._shards))]
        return torch.cat([part for part in parts if part is not None])

    def rows(self, start: int, stop: int) -> Shaped[Tensor, "b ..."]:
        """Rows ``start:stop``, in the stored dtype.

        Raises:
            ValueError: they are outside the store, or a shard was cut or edited.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows {start}:{stop} are outside 0:{len(self)} of {self.path}")
        parts = self._read(start, stop, read_activations)
        if not parts:
            return torch.empty(0, *self.row_shape, dtype=DTYPES[self._checked.dtype])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def places(self, start: int, stop: int) -> Int16[Tensor, "b 2"]:
        """Where rows ``start:stop`` of a store of cells lie: y, x. Row r is of image ``r // cells``."""
        parts = self._read(start, stop, read_places)
        return torch.cat(parts) if parts else torch.empty(0, 2, dtype=torch.int16)

    @property
    def cells_an_image(self) -> int:
        """How many cells it has of each image.

        Raises:
            ValueError: it holds vectors of whole images.
        """
        if self.cells is None and len(self.row_shape) != 3:
            raise ValueError(
                f"{self.path} holds one vector an image, no cells: extract whole grids (pool none) or cells"
            )
        return self.cells or self.row_shape[1] * self.row_shape[2]

    def image_cells(self, start: int, stop: int) -> Float32[Tensor, "images c d"]:
        """All cells of images ``start:stop``, of whole grids in the order of reading."""
        each = self.cells_an_image
        if self.cells is not None:
            return self.rows(start * each, stop * each).float().unflatten(0, (-1, each))
        grids = self.rows(start, stop).float().flatten(2)
        # NumPy copies in this thread alone; torch would begin a team of threads in every reading thread.
        return torch.from_numpy(grids.numpy().transpose(0, 2, 1).copy())

    def cell_places(self, cells: Int64[Tensor, " b"]) -> Int64[Tensor, "b 2"]:
        """Y and x of cells, counted image by image over the whole store."""
        if self.cells is None:
            cells, width = cells % self.cells_an_image, self.row_shape[2]
            return torch.stack([cells // width, cells % width], dim=1)
        found = torch.empty(len(cells), 2, dtype=torch.int64)
        for stop, shard in zip(self._stops, self._shards, strict=True):
            start = stop - shard.rows
            inside = (cells >= start) & (cells < stop)
            if inside.any():
                found[inside] = self.places(start, stop)[cells[inside] - start].long()
        return found

    def _read(
        self, start: int, stop: int, read: Callable[[Path, int, int], Tensor]
    ) -> list[Tensor]:
        """What ``read`` finds in the shards that hold rows ``start:stop``."""
        parts = []
        number = bisect_right(self._stops, start)
        while start < stop:
            first = self._stops[number] - self._shards[number].rows
            until = min(stop, self._stops[number])
            if until > start:
                parts.append(read(self._path(number), start - first, until - first))
            start, number = until, number + 1
        return parts

    def tensor(self) -> Float32[Tensor, "b ..."]:
        """All rows, in float32."""
        whole = torch.empty(len(self), *self.row_shape)
        for stop, shard in zip(self._stops, self._shards, strict=True):
            start = stop - shard.rows
            whole[start:stop] = self.rows(start, stop)
        return whole

    @overload
    def batches(self, batch_size: int) -> Iterator[tuple[int, Tensor]]: ...

    @overload
    def batches(
        self, batch_size: int, shuffle_seed: int, *, buffer_rows: int = ...
    ) -> Iterator[tuple[Tensor, Tensor]]: ...

    def batches(
        self, batch_size: int, shuffle_seed: int | None = None, *, buffer_rows: int = 1 << 18
    ) -> Iterator[tuple[Any, Tensor]]:
        """Every row once, ``batch_size`` at a time, in the stored dtype; the last may be shorter.

        Args:
            batch_size: rows a batch.
            shuffle_seed: shuffle with this seed; None keeps the store's order. Give another
                seed each epoch. A store of at most ``buffer_rows`` rows is shuffled exactly; of
                a larger one, whole shards are drawn at random and their rows mixed in memory.
            buffer_rows: how many rows are held in memory when shuffling (a shard at least).

        Yields:
            ``(start, rows)`` in order; ``(indices, rows)`` shuffled, ``indices`` being Int64[b].

        Raises:
            ValueError: ``batch_size`` is less than 1, or a shard was cut or edited.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
        if shuffle_seed is not None:
            yield from self._shuffled(batch_size, shuffle_seed, buffer_rows)
            return
        for start in range(0, len(self), batch_size):
            yield start, self.rows(start, min(start + batch_size, len(self)))

    def _shuffled(
        self, batch_size: int, seed: int, buffer_rows: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        source = torch.Generator().manual_seed(seed)
        indices = torch.empty(0, dtype=torch.int64)
        rows = self.rows(0, 0)
        for group in self._groups(buffer_rows, source):
            spans = [(self._stops[n] - self._shards[n].rows, self._stops[n]) for n in group]
            new = torch.cat([torch.arange(start, stop) for start, stop in spans])
            order = torch.randperm(len(new), generator=source)
            indices = torch.cat([indices, new[order]])
            rows = torch.cat([rows, torch.cat([self.rows(*span) for span in spans])[order]])
            whole = len(indices) - len(indices) % batch_size
            for start in range(0, whole, batch_size):
                yield indices[start : start + batch_size], rows[start : start + batch_size]
            indices, rows = indices[whole:], rows[whole:]
        if len(indices):
            yield indices, rows

    def _groups(self, buffer_rows: int, source: torch.Generator) -> Iterator[list[int]]:
        """Shards in random order, as many at a time as fit the buffer."""
        group: list[int] = []
        held = 0
        for number in torch.randperm(len(self._shards), generator=source).tolist():
            rows = self._shards[number].rows
            if group and held + rows > buffer_rows:
                yield group
                group, held = [], 0
            group.append(number)
            held += rows
        if group:
            yield group

    def _path(self, number: int) -> Path:
        """The path of a shard, after the check of its hash."""
        shard = self._shards[number]
        path = shard_path(self.path, shard)
        if number in self._unchecked:
            if sha256(path) != shard.sha256:
                raise ValueError(f"{path} was edited after it was written: extract it again")
            self._check(number)
            self._unchecked.discard(number)
        return path

    def _check(self, number: int) -> None:
        """Compare a shard with the manifest, all but its activations and its hash."""
        shard, manifest = self._shards[number], self._checked
        path = shard_path(self.path, shard)
        header = read_header(path)
        said = (header.row_shape, header.dtype, header.labelled, header.cells, header.grid)
        wanted = (manifest.row_shape, manifest.dtype, manifest.labelled, self.cells, self.grid)
        # The shape of no rows means nothing.
        if header.rows != shard.rows or (header.rows and said != wanted):
            raise ValueError(f"{path} disagrees with the store's manifest: extract the store again")
        check_names(path, header, len(manifest.classes), LABEL_LIMIT)


def write_store(
    folder: str | Path,
    activations: Shaped[Tensor, "b ..."],
    ids: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    shard_rows: int = 1024,
    skipped: Skipped = (),
    cells: Cells | None = None,
) -> ActivationStore:
    """Write a whole store from rows in memory, and open it.

    Args:
        folder: where; a store that is there already is not overwritten.
        activations: one row an image, or the same number of cells of each.
        ids: one id an image.
        labels: one class id an image, or None.
        settings: manifest fields that say what made the rows (``layer``, ``classes``, ...).
        shard_rows: images a shard.
        skipped: id and reason of images that have no row.
        cells: where the rows lie, if they are cells.

    Raises:
        ValueError: ``folder`` holds a manifest already, or there are no rows.
    """
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        raise ValueError(f"{folder} already holds a store: choose another folder")
    starts = range(0, max(len(ids), 1), shard_rows)
    each = len(activations) // max(len(ids), 1)
    for number, start in enumerate(starts):
        part = slice(start, start + shard_rows)
        of_part = None if labels is None else labels[part]
        rows = slice(start * each, (start + shard_rows) * each)
        places = None if cells is None else replace(cells, places=cells.places[rows])
        left_out = () if number else skipped
        write_shard(folder, number, activations[rows], ids[part], of_part, left_out, places)
    write_manifest(folder, settings or {}, len(starts))
    return ActivationStore.open(folder, cells=True)
