"""Batches of pixels from a data set, in order, the same for any number of workers.

A batch knows which rows it holds. A picture that can't be read either stops the loop or is left out and
recorded with its id and reason; it never moves another picture against its label.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from revelio.data.dataset import ImageDataset, ImageError
from revelio.seeds import generator


@dataclass(frozen=True)
class Batch:
    """Some images of a data set.

    Attributes:
        indices: their places in the data set.
        ids: their ids.
        pixels: what the transform made of them; (0 3 0 0) where every picture was skipped.
        labels: their class ids, or None where the data set has none.
        skipped: id and reason of each picture of this batch that can't be read.
    """

    indices: list[int]
    ids: list[str]
    pixels: Float[Tensor, "b 3 h w"]
    labels: Int64[Tensor, " b"] | None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    def pin_memory(self) -> "Batch":
        """With pixels in pinned memory, from which a copy to a CUDA device does not wait for it."""
        return replace(self, pixels=self.pixels.pin_memory())


def batches(
    dataset: ImageDataset,
    transform: Callable[..., Float[Tensor, "3 h w"]],
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    on_error: Literal["stop", "skip"] = "stop",
    key: Sequence[str | int] | None = None,
    can_skip: bool = True,
) -> Iterator[Batch]:
    """Read, transform and stack the images at ``indices``, ``batch_size`` at a time.

    Args:
        dataset: where the pictures come from.
        transform: a picture -> pixels; all pictures of a batch must come out in one size.
        batch_size: images a batch; the last may hold fewer, and so does one with skipped pictures.
        indices: which images, in which order; all in order if not given.
        workers: processes that read ahead, at most one a batch; 0 reads in this one.
        on_error: whether an unreadable picture stops the loop or is skipped.
        key: for a transform that draws at random: it is called with a generator keyed by
            ``(*key, image id)`` too, so that what it draws depends on nothing else.
        can_skip: whether the user may set ``on_error``: else an error does not name it.

    Yields:
        One :class:`Batch` for each ``batch_size`` indices, in their order. Its length is 0 where every
        picture was skipped.

    Raises:
        ImageError: a picture can't be read and ``on_error`` is ``stop``; batches before it are whole.
        ValueError: a setting is out of range.
    """
    if batch_size < 1 or workers < 0 or on_error not in ("stop", "skip"):
        raise ValueError(
            f"batch_size {batch_size}, workers {workers}, on_error {on_error!r}: "
            "give 1 or more, 0 or more, and stop or skip"
        )
    order = list(range(len(dataset))) if indices is None else list(indices)
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    source = _Chunks(dataset, transform, chunks, on_error, None if key is None else tuple(key))
    # A generator of its own: without one the loader would draw from torch's global one.
    loader: DataLoader[Any] = DataLoader(
        source,
        batch_size=None,
        num_workers=min(workers, len(chunks)),
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if batch.skipped and on_error == "stop":
            image_id, reason = batch.skipped[0]
            raise ImageError(image_id, f"{reason}; {MEND if can_skip else ONLY_MEND}")
        yield batch


# A long run stops at one bad picture among many: it says what goes on without it.
ONLY_MEND = "mend it, all pictures are needed here"
MEND = "mend or remove it, or set on_error to skip to leave such pictures out"


@contextmanager
def mendable() -> Iterator[None]:
    """For what reads pictures one by one, where ``on_error`` may be set: an unreadable one says so.

    Raises:
        ImageError: a picture can't be read.
    """
    try:
        yield
    except ImageError as error:
        if MEND in error.reason:
            raise
        raise ImageError(error.image_id, f"{error.reason}; {MEND}") from error


@dataclass(frozen=True)
class _Chunks(Dataset[Batch]):
    """What a worker sees: whole batches, so that pixels are stacked where they are made."""

    dataset: ImageDataset
    transform: Callable[..., Tensor]
    chunks: Sequence[Sequence[int]]
    on_error: str
    key: tuple[str | int, ...] | None

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Batch:
        kept: list[int] = []
        pixels: list[Tensor] = []
        skipped: list[tuple[str, str]] = []
        for index in self.chunks[number]:
            try:
                image = self.dataset.read(index)
            except ImageError as error:
                # Raised by the reader of the batches, in its turn: an exception loses its fields
                # on the way out of a worker.
                skipped.append((error.image_id, error.reason))
                if self.on_error == "stop":
                    break
                continue
            pixels.append(self._pixels(image, self.dataset.ids[index]))
            kept.append(index)
        labels = self.dataset.labels
        return Batch(
            indices=kept,
            ids=[self.dataset.ids[index] for index in kept],
            pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0),
            labels=None if labels is None else torch.tensor([labels[i] for i in kept]).long(),
            skipped=skipped,
        )

    def _pixels(self, image: Any, image_id: str) -> Tensor:
        if self.key is None:
            return self.transform(image)
        return self.transform(image, generator(*self.key, image_id))
