"""What frozen towers make of a data set's pictures, kept once: training then reads no picture.

One activation store (``revelio/activations/FORMAT.md``) a tower in ``<cache>/<backbone>-<layer>...``; a row
is what is kept of an image (:mod:`llava_ext.tower_rows`): its grid, or what the tower starts from. A row's id
names the image and what it holds (:mod:`llava_ext.images`). The manifest's ``tower`` holds the tower's
identity (settings, processor, aspect, hash of its weights); a cache of another identity, or that lacks an
image, is an error. It is filled by :mod:`llava_ext.tower_cache_job`.

``checked.json`` beside the stores says of which files the hashes were compared, by size and time of change:
they are read through once, not at every start.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from llava_ext.config import QUESTION, Keep
from llava_ext.images import name_of, picture_ids, plain_ids
from llava_ext.tower_rows import KeptTower, store_name
from llava_ext.towers import Tower
from revelio.activations.manifest import MANIFEST
from revelio.activations.store import ActivationStore
from revelio.activations.writer import check_same
from revelio.data.contents import combined
from revelio.distributed import is_main
from revelio.files import write_whole
from revelio.trust import leads_out, printable, read_object

# Caches up to this size are read into memory, larger ones row by row from disk.
IN_MEMORY = 2 * 10**9
# How a tower was called doesn't matter: its weights are hashed.
FREE = {"backbone", "revision"}
MAKE = "make it with `revelio llava cache`"
CHECKED = "checked.json"


class CachedGrids:
    """What is kept of the pictures, as the data set's ``ImageProvider``; make one with :meth:`open`.

    Attributes:
        stores: one a tower.
        towers: those that are run on the rows; none where grids are kept of all.
    """

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        kept: Sequence[KeptTower],
        rows: Sequence[Mapping[str, int]],
    ) -> None:
        self.stores = tuple(stores)
        latents = any(each.keep == "latents" for each in kept)
        self.towers: Sequence[Tower] = tuple(kept) if latents else ()
        self._kept = tuple(kept)
        self._rows = tuple(rows)
        small = sum(store.bytes for store in stores) <= IN_MEMORY
        self._held = tuple(store.rows(0, len(store)) for store in stores) if small else None

    @classmethod
    def open(
        cls, cache: Path, towers: Sequence[Tower], folder: Path | None, names: Sequence[str]
    ) -> "CachedGrids":
        """Open the cache of these towers and see that it holds these images.

        Args:
            cache: the folder that `revelio llava cache` made.
            towers: compared by identity; none is run.
            folder: of the images, if there is one. Of those that are not in it, rows are found by the images'
                names, and whether a picture has changed since can't be told.
            names: the images that will be asked for.

        Raises:
            ValueError: a store is missing or unfinished, is of another tower, or lacks an image.
        """
        stores, kept = zip(*(open_store(cache, tower) for tower in towers), strict=True)
        here = [name for name in names if folder is not None and _is_inside(folder, name)]
        where = folder or Path()
        exact = dict(zip(here, picture_ids(where, here, cache), strict=True))
        plain = dict(zip(here, plain_ids(where, here), strict=True))
        rows = []
        for store in stores:
            gone = {} if len(here) == len(names) else {name_of(one): one for one in store.ids}
            ids, old = (
                [known.get(name) or gone.get(name, name) for name in names]
                for known in (exact, plain)
            )
            rows.append(_row_numbers(store, names, ids, old))
        return cls(stores, kept, rows)

    def identities(self) -> list[dict[str, str]]:
        """Hashes of each tower's weights and of its rows."""
        pairs = zip(self._kept, self.stores, strict=True)
        return [
            {
                "weights": kept.identity()["weights"],
                "cache": combined(shard["sha256"] for shard in store.manifest["shards"]),
            }
            for kept, store in pairs
        ]

    def get(self, name: str) -> tuple[Tensor, ...]:
        """One row a tower."""
        numbers = [rows[name] for rows in self._rows]
        if self._held is not None:
            return tuple(held[number] for held, number in zip(self._held, numbers, strict=True))
        pairs = zip(self.stores, numbers, strict=True)
        return tuple(store.rows(number, number + 1)[0] for store, number in pairs)

    def stack(self, images: Sequence[tuple[Tensor, ...]]) -> Mapping[str, Any]:
        """``grids``, one tensor (i c h w) a tower, i = 0 where there are no images.

        Where towers go on from what is kept: ``pixels`` for them, and ``image_ids``.
        """
        columns = (
            [torch.stack(column) for column in zip(*images, strict=True)]
            if images
            else [store.rows(0, 0) for store in self.stores]
        )
        pairs = list(zip(self._kept, columns, strict=True))
        if not self.towers:
            return {"grids": tuple(kept.grids(rows) for kept, rows in pairs)}
        named = next((kept, rows) for kept, rows in pairs if kept.keep == "latents")
        return {"pixels": tuple(columns), "image_ids": named[0].names(named[1])}


def _is_inside(folder: Path, name: str) -> bool:
    return not leads_out(name) and (folder / name).is_file()


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


def open_store(cache: Path, tower: Tower) -> tuple[ActivationStore, KeptTower]:
    """The finished store of a tower, and what it keeps, after the tower's identity was compared.

    Of several the one that leaves the least to do in training.

    Raises:
        ValueError: it is missing or unfinished, was made by another tower or with other settings, or a shard
            is not what was written.
    """
    kept = _find(cache, tower)
    path = cache / kept.name
    stamp = _stamp(path)
    known = stamp == _stamps(cache).get(kept.name)
    store = ActivationStore.open(path, verify=not known, packed=True)
    was = store.manifest.get("tower")
    if not isinstance(was, Mapping):
        raise ValueError(f"{path} is a store of another kind, not a tower's cache: {MAKE}")
    check_same(path, was, kept.identity(), free=FREE)
    if store.row_shape != kept.row_shape:
        raise ValueError(
            f"{path} holds rows of {store.row_shape}, the config asks for {kept.row_shape}: {MAKE}"
        )
    if not known:
        store.verify()
        if is_main():
            with suppress(OSError):  # a cache that can't be written is checked at every start
                write_stamp(cache, kept.name)
    return store, kept


def _find(cache: Path, tower: Tower) -> KeptTower:
    keeps: list[Keep] = list(get_args(Keep))
    if tower.config.prompt == QUESTION:
        keeps = ["latents"]
    for keep in keeps:
        if (cache / store_name(tower.config, keep) / MANIFEST).is_file():
            return KeptTower(tower, keep)
    raise ValueError(f"no finished cache at {cache / store_name(tower.config, keeps[0])}: {MAKE}")


def write_stamp(cache: Path, name: str) -> None:
    """Note down that a store's files are what its manifest says: they were just written or compared.

    Nothing is noted where another file has the name.
    """
    stamps = _stamps(cache)
    if stamps or not (cache / CHECKED).exists():
        stamps |= {name: _stamp(cache / name)}
        write_whole(cache / CHECKED, json.dumps({"format": 1, "stores": stamps}))


def _stamps(cache: Path) -> dict[str, Any]:
    with suppress(ValueError):
        found = read_object(cache / CHECKED).get("stores")
        if isinstance(found, dict):
            return found
    return {}


def _stamp(path: Path) -> list[dict[str, Any]]:
    """Size and time of change of the manifest and the shards, in order."""
    files = [path / MANIFEST, *sorted(path.glob("shard-*.safetensors"))]
    stats = [(file.name, file.stat()) for file in files]
    return [{"file": name, "size": s.st_size, "mtime_ns": s.st_mtime_ns} for name, s in stats]
