"""Where Diff-C's grids come from: tensors, activation stores, or a backbone at work.

A source has *views* of every image. View 0 is the plain one (resize, centre crop, noise draw 0): what
validation and test see. View v >= 1 is augmented (random crop and flip) with noise draw v. Crop and noise
are keyed by (seed, image id, view), so that a view is the same whenever and in whatever batch it is asked
for. Training on-line takes view e in epoch e; with V stored views it takes them in turn.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from revelio.activations.store import ActivationStore
from revelio.backbones.base import Backbone
from revelio.backbones.layers import check_grid
from revelio.data.contents import combined
from revelio.data.dataset import ImageDataset
from revelio.data.transforms import RandomCropTransform, SquareTransform
from revelio.seeds import generator
from revelio.wording import plural

PLAIN = 0
BYTES = 4  # of a number, at most
CROP_SCALE = (
    0.8,
    1.0,
)  # SPEC of the released code: RandomResizedCrop(512, scale=(0.8, 1.0)), flip 0.5


class GridSource(Protocol):
    """Labelled grids of images, in several views.

    Attributes:
        ids: one name an image.
        labels: one class id an image.
        shape: (c, h, w) of a grid.
        views: how many augmented views there are; None for as many as one asks for.
        contents: a hash of the images' stored bytes; None where it isn't known.
    """

    ids: Sequence[str]
    labels: Sequence[int]
    shape: tuple[int, int, int]
    views: int | None

    @property
    def contents(self) -> str | None:
        """A hash of the images' stored bytes, in order."""
        ...

    def grids(self, indices: Sequence[int], view: int) -> Float[Tensor, "b c h w"]:
        """The grids of the images at ``indices``, float32 on any device."""
        ...


def training_view(epoch: int, views: int | None) -> int:
    """The view that epoch 1, 2, ... trains on."""
    if views is None:
        return epoch
    return PLAIN if views == 0 else 1 + (epoch - 1) % views


class TensorGrids:
    """Grids at hand, one tensor a view, the plain one first.

    Args:
        views: tensors (n c h w) or (n d), which become 1x1 grids; of one shape, on any device, of any
            floating type, and possibly memory-mapped.
        labels: one class id an image.
        ids: one name an image; none: the row numbers.
        contents: a hash of what the grids were made of, where it is known.

    Raises:
        ValueError: the tensors differ in shape or are no grids, or labels or ids are not as many.
    """

    def __init__(
        self,
        views: Sequence["Tensor | StoreRows"],
        labels: Sequence[int],
        ids: Sequence[str] | None = None,
        contents: str | None = None,
    ) -> None:
        if not views:
            raise ValueError("no grids: give at least one tensor of shape (n, c, h, w)")
        first = views[0]
        if first.ndim not in (2, 4):
            raise ValueError(f"grids have shape {tuple(first.shape)}: it must be (n, c, h, w)")
        for other in views[1:]:
            if other.shape != first.shape:
                raise ValueError(
                    f"views differ: {tuple(first.shape)} and {tuple(other.shape)}; "
                    "give views of the same images from the same layer"
                )
        check_labels(labels, len(first))
        self._views = views
        self.contents = contents
        self.labels: Sequence[int] = list(map(int, labels))
        self.ids: Sequence[str] = list(map(str, range(len(first)))) if ids is None else list(ids)
        if len(self.ids) != len(first):
            raise ValueError(
                f"{plural(len(self.ids), 'id')} for {plural(len(first), 'grid')}: give one each"
            )
        channels, height, width = (*first.shape[1:], 1, 1)[:3]
        self.shape = (int(channels), int(height), int(width))
        self.views: int | None = len(views) - 1

    def grids(self, indices: Sequence[int], view: int) -> Float[Tensor, "b c h w"]:
        """The rows at ``indices`` of one view, float32."""
        rows = self._views[view][torch.as_tensor(indices, dtype=torch.long)]
        return rows.float().view(len(indices), *self.shape)


class LiveGrids:
    """Grids made when they are asked for: picture -> crop -> backbone at one layer and timestep.

    Args:
        dataset: labelled images.
        backbone: what makes the grids.
        layer: one of the backbone's layers.
        timestep: the training index the noise is for; None for a model without noise.
        prompts: a text an image, in the dataset's order; None: the empty prompt (DiT: null class).
        seed: of crops and noise.
        workers: threads that read and crop pictures.

    Raises:
        KeyError: the backbone doesn't have the layer.
        ValueError: the images have no labels, or the prompts are not as many as they.
    """

    views: int | None = None  # as many as there are epochs

    @property
    def contents(self) -> str | None:
        """A hash of the pictures' stored bytes, in order; None where they are stored nowhere."""
        if self._contents is None:
            self._contents = self._dataset.contents()
        return self._contents

    def __init__(
        self,
        dataset: ImageDataset,
        backbone: Backbone,
        layer: str,
        *,
        timestep: int | None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        check_grid(backbone.layers, layer, backbone.name)
        if dataset.labels is None:
            raise ValueError(f"{dataset.name} has no labels, which a classifier needs")
        check_labels(dataset.labels, len(dataset))
        if prompts is not None and len(prompts) != len(dataset):
            raise ValueError(
                f"{plural(len(prompts), 'prompt')} for {plural(len(dataset), 'image')}: give one each"
            )
        self._dataset, self._backbone, self._layer = dataset, backbone, layer
        self._timestep, self._prompts, self._seed = timestep, prompts, seed
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._augment = _augmented(backbone)
        self._contents: str | None = None
        self._hashes: dict[int, str] = {}
        self.ids: Sequence[str] = list(dataset.ids)
        self.labels: Sequence[int] = list(dataset.labels)
        channels, height, width = self.grids([0], PLAIN).shape[1:]
        self.shape = (int(channels), int(height), int(width))

    @torch.no_grad()
    def grids(self, indices: Sequence[int], view: int) -> Float[Tensor, "b c h w"]:
        """One pass of the backbone over the images at ``indices``."""
        read = self._pool.map if self._pool else map
        pixels = torch.stack(list(read(lambda index: self._pixels(index, view), indices)))
        prompts = self._prompts
        found = self._backbone.activations(
            self._backbone.encode(pixels),
            [self.ids[index] for index in indices],
            [self._layer],
            timestep=self._timestep,
            prompts=None if prompts is None else [prompts[index] for index in indices],
            seed=self._seed,
            draw=view,
        )
        return found[self._layer].float()

    def picture_hashes(self) -> list[str]:
        """A hash of each image's pixels; reads those that no view has read yet."""
        left = [index for index in range(len(self.ids)) if index not in self._hashes]
        list((self._pool.map if self._pool else map)(self._read, left))
        return [self._hashes[index] for index in range(len(self.ids))]

    def _read(self, index: int) -> Image.Image:
        image = self._dataset.read(index)
        if index not in self._hashes:
            size = f"{image.mode} {image.width} {image.height} ".encode()
            self._hashes[index] = short_hash(size + image.tobytes())
        return image

    def _pixels(self, index: int, view: int) -> Float[Tensor, "3 h w"]:
        image = self._read(index)
        if view == PLAIN:
            return self._backbone.transform(image)
        return self._augment(image, generator(self._seed, "crop", self.ids[index], view))


def _augmented(backbone: Backbone) -> RandomCropTransform:
    plain = backbone.transform
    if not isinstance(plain, SquareTransform):
        raise ValueError(f"{backbone.name} has a transform of its own, which can't be augmented")
    return RandomCropTransform(plain.size, plain.mean, plain.std, CROP_SCALE, plain.interpolation)


class StoreRows:
    """A store's rows read when they are asked for: stands in for a tensor that memory can't hold."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self.shape = torch.Size((len(store), *store.row_shape))
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.cat([self._store.rows(row, row + 1) for row in rows.tolist()])


def stored_grids(stores: Sequence[ActivationStore], memory_gb: float = 8.0) -> TensorGrids:
    """The grids of activation stores: the first is the plain view, training takes all in turn.

    Args:
        stores: of the same images and layer; several draws, or several augmented extractions.
        memory_gb: total size up to which they are read into memory; beyond, rows are read when needed.

    Raises:
        ValueError: the stores have no labels, or are not of the same images and layer.
    """
    first = stores[0]
    if first.labels is None:
        raise ValueError(f"{first.path} has no labels, which a classifier needs")
    for other in stores[1:]:
        if list(other.ids) != list(first.ids) or other.row_shape != first.row_shape:
            raise ValueError(
                f"{other.path} and {first.path} hold different images or layers: "
                "give stores of one layer, extracted from one data set with several draws"
            )
    values = sum(len(store) * math.prod(store.row_shape) for store in stores)
    fits = values * BYTES / 1e9 <= memory_gb
    views = [_read(store) if fits else StoreRows(store) for store in stores]
    labels = first.labels.tolist()
    contents = combined(store.sha256 for store in stores)
    return TensorGrids(
        views if len(views) == 1 else [views[0], *views], labels, first.ids, contents
    )


def _read(store: ActivationStore) -> Tensor:
    rows: Tensor | None = None
    for start, part in store.batches(1024):
        if rows is None:
            rows = torch.empty((len(store), *store.row_shape), dtype=part.dtype)
        rows[start : start + len(part)] = part
    if rows is None:
        raise ValueError(f"{store.path} is empty")
    return rows


def short_hash(content: bytes) -> str:
    """64 bits of a sha256, in hexadecimal: enough to tell a million pictures apart."""
    return hashlib.sha256(content).hexdigest()[:16]


def check_labels(labels: Sequence[int], count: int) -> None:
    """Refuse labels that are not one class id an image.

    Raises:
        ValueError: there are none, they are not ``count``, or one is negative.
    """
    if count == 0:
        raise ValueError("there are no images")
    if len(labels) != count:
        raise ValueError(
            f"{plural(len(labels), 'label')} for {plural(count, 'image')}: give one each"
        )
    if min(labels) < 0:
        raise ValueError(
            f"a label is {min(labels)}: class ids count from 0 (drop unlabelled images)"
        )


def chunks(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """``indices`` in pieces of ``size``, the last maybe shorter."""
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])
