"""A data set of images, as the rest of Revelio sees it: ids, labels, and a way to read one picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from PIL import Image

from revelio.data.contents import combined, digests
from revelio.trust import printable

T = TypeVar("T")


class ImageError(ValueError):
    """A picture that can't be read; says which and why."""

    def __init__(self, image_id: str, reason: str) -> None:
        super().__init__(f"image {printable(image_id)} can't be read: {printable(reason)}")
        self.image_id = image_id
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Without it the one-line message would be passed for both arguments when it crosses processes.
        return ImageError, (self.image_id, self.reason)


@dataclass(frozen=True)
class ImageDataset:
    """Images in a fixed order; rows of a store follow it.

    Attributes:
        name: what results call the set, such as ``caltech101``.
        split: ``train``, ``test``, ... or None where there are none.
        classes: class names by class id; empty where the images have no labels.
        ids: one stable, unique name an image (a path inside the folder, an id of the set).
        labels: one class id an image, or None where the images have no labels.
        read: gives the picture at an index, in RGB; raises :class:`ImageError`.
        digest: gives a hash of the stored bytes of the picture at an index; None where pictures are
            made in memory and are stored nowhere.
    """

    name: str
    split: str | None
    classes: tuple[str, ...]
    ids: Sequence[str]
    labels: Sequence[int] | None
    read: Callable[[int], Image.Image]
    digest: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int]) -> "ImageDataset":
        """The images at ``indices``, in that order."""
        kept = list(indices)
        return replace(
            self,
            ids=[self.ids[i] for i in kept],
            labels=None if self.labels is None else [self.labels[i] for i in kept],
            # No closure: workers that are started afresh (not forked) get the data set by pickle.
            read=partial(_at_kept, self.read, kept),
            digest=None if self.digest is None else partial(_at_kept, self.digest, kept),
        )

    def digests(self) -> list[str] | None:
        """A hash of each picture's stored bytes, in order; None where they are stored nowhere."""
        return None if self.digest is None else digests(self.digest, len(self))

    def contents(self) -> str | None:
        """One hash of all pictures' stored bytes, in order; None where they are stored nowhere."""
        found = self.digests()
        return None if found is None else combined(found)

    def hashed(self, progress: Callable[[int], object] | None = None) -> "ImageDataset":
        """The same images with their digests read now, for good; ``progress`` is told 1 after each."""
        if self.digest is None:
            return self
        known = digests(self.digest, len(self), progress)
        return replace(self, digest=known.__getitem__)

    def spread(self, limit: int) -> "ImageDataset":
        """At most ``limit`` images, spread evenly over the set."""
        if limit >= len(self):
            return self
        return self.subset([i * len(self) // limit for i in range(limit)])


def _at_kept(of_all: Callable[[int], T], kept: Sequence[int], index: int) -> T:
    return of_all(kept[index])
