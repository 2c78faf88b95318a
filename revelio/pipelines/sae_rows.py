"""The rows that a k-SAE sees: of one store or several, one an image or its cells, normalized by store.

Cells are balanced over images: each image of each store gives as many, those of the smallest grid; of larger
grids they are drawn by the image's id. Nothing is read before it is asked for.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.activations.store import ActivationStore
from revelio.analysis.top_images import pooled
from revelio.sae.config import Rows
from revelio.sae.inputs import MEASURED_ROWS, Input
from revelio.seeds import generator

BLOCK = 1024


class StoreRows:
    """Rows of some images of a store, as vectors in float32, normalized where an input says how.

    Args:
        store: what to read from.
        images: which of its images, in ascending order.
        cells: whether a row is a cell; else it is an image, whose grid is averaged over its cells.
        each: cells of an image; None: all that the store has of it.
    """

    def __init__(
        self,
        store: ActivationStore,
        images: Int64[Tensor, " n"],
        *,
        cells: bool = False,
        each: int | None = None,
    ) -> None:
        self.store, self.images = store, images
        self.input: Input | None = None
        self.cells = cells
        self._whole = store.cells_an_image if cells else 1
        self.group = min(each or self._whole, self._whole)
        # Whole images, so that none is read twice.
        self._step = max(1, BLOCK // self.group) * self.group

    def __len__(self) -> int:
        return len(self.images) * self.group

    def rows(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        """Rows ``start`` to ``stop`` as the k-SAE sees them."""
        found = self.raw(start, stop)
        return found if self.input is None else self.input.normalized(found)

    def raw(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        """Rows ``start`` to ``stop`` as they are stored."""
        first, last = start // self.group, -(-stop // self.group)
        wanted = self.images[first:last]
        if not len(wanted):
            return torch.empty(0, self.store.row_shape[0])
        found, low, high = [], int(wanted[0]), int(wanted[-1]) + 1
        step = max(1, BLOCK // self._whole)
        # In blocks: what lies between is read too, and whole grids are large.
        for at in range(low, high, step):
            end = min(at + step, high)
            inside = wanted[(wanted >= at) & (wanted < end)]
            if len(inside):
                vectors = self._vectors(at, end)
                if len(inside) < end - at:
                    vectors = vectors[inside - at]
                found.append(vectors[self._drawn(inside)].flatten(0, 1))
        flat = found[0] if len(found) == 1 else torch.cat(found)
        return flat[start - first * self.group : stop - first * self.group]

    def _vectors(self, start: int, stop: int) -> Float[Tensor, "images c d"]:
        """All rows of the images ``start`` to ``stop`` of the store."""
        if not self.cells:
            return pooled(self.store.rows(start, stop))[:, None]
        return self.store.image_cells(start, stop)

    def _drawn(self, images: Int64[Tensor, " n"]) -> tuple[Tensor, Tensor] | slice:
        """The index of the cells that are taken of each of the images."""
        if self.group == self._whole:
            return slice(None)
        ids = [self.store.ids[image] for image in images]
        drawn = [torch.randperm(self._whole, generator=generator("cells", x)) for x in ids]
        chosen = torch.stack([one[: self.group].sort().values for one in drawn])
        return torch.arange(len(images))[:, None], chosen

    def batches(self, *, raw: bool = False) -> Iterator[Float[Tensor, "b d"]]:
        """All of them in order, some at a time."""
        read = self.raw if raw else self.rows
        for start in range(0, len(self), self._step):
            yield read(start, min(start + self._step, len(self)))

    def sample(self, count: int = MEASURED_ROWS) -> Iterator[Float[Tensor, "b d"]]:
        """Blocks of stored rows spread evenly, about ``count`` rows in all."""
        blocks = range(0, len(self), self._step)
        wanted = max(1, count // self._step)
        for start in blocks[:: max(1, -(-len(blocks) // wanted))]:
            yield self.raw(start, min(start + self._step, len(self)))


class JoinedRows:
    """The rows of several stores, one store after another.

    Args:
        parts: at least one, all of the same width.
    """

    def __init__(self, parts: Sequence[StoreRows]) -> None:
        self.parts = list(parts)
        self._stops = list(accumulate(map(len, self.parts)))

    @property
    def group(self) -> int:
        """Rows an image, which lie together."""
        return self.parts[0].group

    @property
    def cells(self) -> bool:
        """Whether a row is a cell."""
        return self.parts[0].cells

    @property
    def width(self) -> int:
        """The length of a row."""
        return self.parts[0].store.row_shape[0]

    def __len__(self) -> int:
        return self._stops[-1]

    def rows(self, start: int, stop: int) -> Float[Tensor, "b d"]:
        """Rows ``start`` to ``stop`` as the k-SAE sees them."""
        found = []
        for number in range(bisect_right(self._stops, start), len(self.parts)):
            part = self.parts[number]
            before = self._stops[number] - len(part)
            if before >= stop:
                break
            found.append(part.rows(max(start - before, 0), min(stop - before, len(part))))
        return torch.cat(found) if found else torch.empty(0, self.width)

    def batches(self) -> Iterator[Float[Tensor, "b d"]]:
        """All of them in order, some at a time."""
        for part in self.parts:
            yield from part.batches()


def open_stores(paths: Sequence[Path], rows: Rows) -> list[ActivationStore]:
    """The stores that a k-SAE is trained on.

    Raises:
        ValueError: one is given twice, is of another width or model than the first, or does not hold such
            rows; it is named.
    """
    stores = [ActivationStore.open(path, cells=rows == "cells") for path in paths]
    first = stores[0]
    for number, store in enumerate(stores):
        if store.sha256 in {other.sha256 for other in stores[:number]}:
            raise ValueError(f"{store.path} is given twice: name each store once")
        if store.row_shape[0] != first.row_shape[0]:
            raise ValueError(
                f"{store.path} holds rows of width {store.row_shape[0]}, {first.path} of "
                f"{first.row_shape[0]}: one k-SAE takes stores of one width"
            )
        if store.manifest.get("model") != first.manifest.get("model"):
            raise ValueError(
                f"{store.path} is of the model {store.manifest.get('model')}, {first.path} of "
                f"{first.manifest.get('model')}: one k-SAE takes stores of one model"
            )
        if rows == "cells":
            _ = store.cells_an_image  # or it says that there are none
    return stores
