"""Frozen-tower grids of a data set, computed once: training then runs no vision tower.

One activation store (``revelio/activations/FORMAT.md``) a tower in ``<cache>/<backbone>-<layer>...``; a row
is an image's grid in float16, averaged to the tower's budget where its tokens are ``pool``. A row's id names
the image and what it holds (:mod:`llava_ext.images`). The manifest's ``tower`` holds the tower's identity
(settings, processor, aspect, hash of its weights); a cache of another identity, or that lacks an image, is an
error. It is filled by :mod:`llava_ext.tower_cache_job`.
"""

import warnings
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from llava_ext.config import QUESTION, TowerConfig
from llava_ext.images import picture_ids, plain_ids
from llava_ext.towers import Tower
from revelio.activations.manifest import MANIFEST
from revelio.activations.store import ActivationStore
from revelio.activations.writer import check_same
from revelio.trust import printable

DTYPE = "float16"
# Caches up to this size are read into memory, larger ones row by row from disk.
IN_MEMORY = 2 * 10**9
# How a tower was called doesn't matter: its weights are hashed.
FREE = {"backbone", "revision"}
MAKE = "make it with `revelio llava cache`"


def store_name(config: TowerConfig) -> str:
    """The folder of a tower's store inside a cache.

    Raises:
        ValueError: its grids depend on more than the picture.
    """
    if config.prompt == QUESTION:
        raise ValueError(
            f"tower {config.backbone} {config.layer} is prompted by the question, so a picture's grid "
            "differs with what is asked: train without a cache"
        )
    parts = [config.backbone.rstrip("/").rpartition("/")[2].replace(":", "-"), config.layer]
    if config.timestep is not None:
        parts += [f"t{config.timestep}", f"d{config.draw}"]
    if config.timesteps:
        parts += [f"t{'-'.join(map(str, config.timesteps))}", f"d{config.draw}"]
    if config.tokens == "pool":
        parts.append(f"pool{isqrt(config.budget)}")
    return "-".join(parts)


def row_shape(tower: Tower) -> tuple[int, int, int]:
    """Channels, height and width of a cached grid."""
    side = isqrt(tower.config.budget)
    pooled = tower.config.tokens == "pool"
    return (tower.channels, side, side) if pooled else (tower.channels, *tower.grid)


def to_row(tower: Tower, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i c y x"]:
    """Grids as they are kept: averaged for ``pool``, in float16.

    Raises:
        ValueError: a value doesn't fit float16.
    """
    shape = row_shape(tower)[1:]
    kept = adaptive_avg_pool2d(grids.float(), shape) if grids.shape[-2:] != shape else grids
    rows = kept.to(torch.float16)
    if not torch.isfinite(rows).all():
        largest = kept.abs().max().item()
        raise ValueError(
            f"tower {tower.config.backbone} {tower.config.layer} gives values up to {largest:.3g}, "
            "which float16 can't hold: train without a cache"
        )
    return rows.cpu()


class CachedGrids:
    """The cached grids of all towers, as the data set's ``ImageProvider``; make one with :meth:`open`."""

    def __init__(self, stores: Sequence[ActivationStore], rows: Sequence[Mapping[str, int]]):
        self.stores = tuple(stores)
        self._rows = tuple(rows)
        small = sum(_bytes(store) for store in stores) <= IN_MEMORY
        self._held = tuple(store.rows(0, len(store)) for store in stores) if small else None

    @classmethod
    def open(
        cls, cache: Path, towers: Sequence[Tower], folder: Path | None, names: Sequence[str]
    ) -> "CachedGrids":
        """Open the cache of these towers and see that it holds these images.

        Args:
            cache: the folder that `revelio llava cache` made.
            towers: compared by identity; none is run.
            folder: of the images; None where they are not here: then rows are found by the images' names, and
                whether a picture has changed since can't be told.
            names: the images that will be asked for.

        Raises:
            ValueError: a store is missing or unfinished, is of another tower, or lacks an image.
        """
        stores = [open_store(cache, tower) for tower in towers]
        if folder is None:
            named = [{one.split("|")[0]: one for one in store.ids} for store in stores]
            found = [[ids.get(name, name) for name in names] for ids in named]
            pairs = zip(stores, found, strict=True)
            return cls(stores, [_row_numbers(store, names, ids, ids) for store, ids in pairs])
        ids, plain = picture_ids(folder, names, cache), plain_ids(folder, names)
        return cls(stores, [_row_numbers(store, names, ids, plain) for store in stores])

    def get(self, name: str) -> tuple[Tensor, ...]:
        """One grid (c h w) a tower."""
        numbers = [rows[name] for rows in self._rows]
        if self._held is not None:
            return tuple(held[number] for held, number in zip(self._held, numbers, strict=True))
        pairs = zip(self.stores, numbers, strict=True)
        return tuple(store.rows(number, number + 1)[0] for store, number in pairs)

    def stack(self, images: Sequence[tuple[Tensor, ...]]) -> Mapping[str, Any]:
        """``grids``: one tensor (i c h w) a tower, i = 0 where there are no images."""
        if not images:
            empty = (torch.empty(0, *store.row_shape) for store in self.stores)
            return {"grids": tuple(empty)}
        return {"grids": tuple(torch.stack(column) for column in zip(*images, strict=True))}


def _row_numbers(
    store: ActivationStore, names: Sequence[str], ids: Sequence[str], plain: Sequence[str]
) -> dict[str, int]:
    """The row of each image by name.

    Raises:
        ValueError: the store lacks one, or holds it as it was before it changed.
    """
    found = {identity: number for number, identity in enumerate(store.ids)}
    rows: dict[str, int] = {}
    for name, identity, old in zip(names, ids, plain, strict=True):
        row = found.get(identity, found.get(old))
        if row is None:
            raise ValueError(
                f"{store.path} lacks image {printable(name)}, or holds it as it was before it "
                f"changed: {MAKE} in another folder"
            )
        rows[name] = row
    if any(identity not in found for identity in ids):
        warnings.warn(
            f"{store.path} is of a version that knew pictures by name and size only: if one was edited "
            f"since, {MAKE} in another folder",
            stacklevel=3,
        )
    return rows


def open_store(cache: Path, tower: Tower) -> ActivationStore:
    """The finished store of a tower, after its identity was compared.

    Raises:
        ValueError: it is missing or unfinished, or was made by another tower or with other settings.
    """
    path = cache / store_name(tower.config)
    if not (path / MANIFEST).is_file():
        raise ValueError(f"no finished cache at {path}: {MAKE}")
    store = ActivationStore.open(path)
    was = store.manifest.get("tower")
    if not isinstance(was, Mapping):
        raise ValueError(f"{path} is a store of another kind, not a tower's cache: {MAKE}")
    check_same(path, was, tower.identity(), free=FREE)
    if store.row_shape != row_shape(tower):
        raise ValueError(
            f"{path} holds grids of {store.row_shape}, the config asks for {row_shape(tower)}: {MAKE}"
        )
    return store


def _bytes(store: ActivationStore) -> int:
    return sum(shard["bytes"] for shard in store.manifest["shards"])
