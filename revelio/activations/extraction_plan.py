"""One extraction, described: which stores it makes, with which settings, and their shards.

Shard i of every store is the images ``[i * size, (i + 1) * size)`` of the data set, whatever was there
before and however many processes share the work.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor

from revelio.activations.config import DEFAULT_BATCH, ExtractConfig, ForwardPass
from revelio.activations.encode import Encoded, cells_of, pooled, random_cells
from revelio.activations.format import DTYPES, Cells
from revelio.activations.vae_cache import VAECache
from revelio.activations.writer import CONTENTS, SHARD_CONTENTS, StoreWriter
from revelio.backbones.base import Backbone
from revelio.data.contents import combined
from revelio.data.dataset import ImageDataset
from revelio.data.transforms import crop_of
from revelio.distributed import Processes
from revelio.lock import Lock
from revelio.run_dir import versions

# What the open shards of all stores may take in memory together.
OPEN_BYTES = 512 * 2**20
SHARD_IMAGES = 1024
# What ties cached latents to a run.
CACHED = (
    "model", "revision", "compute_dtype", "image_size", "dataset", "split", "classes", "images",
    "dataset_sha256", CONTENTS, SHARD_CONTENTS, "shard_images", "made_with",
)  # fmt: skip

Texts = Callable[[Sequence[int]], Sequence[str]]


@dataclass(frozen=True)
class Rows:
    """What one layer gives of a batch.

    Attributes:
        values: one row an image, or as many as it has cells.
        cells: where the rows lie, if they are cells.
    """

    values: Shaped[Tensor, "b ..."]
    cells: Cells | None


@dataclass(frozen=True)
class Lacking:
    """The shards that stores and cache lack.

    Attributes:
        stores: the numbers each store lacks, by pass and layer.
        cache: the numbers the cache of latents lacks; empty where none is used.
    """

    stores: Mapping[tuple[ForwardPass, str], set[int]]
    cache: set[int]

    @property
    def shards(self) -> list[int]:
        """The shards that have something left to be made."""
        return sorted(set().union(self.cache, *self.stores.values()))

    def passes(self) -> dict[ForwardPass, set[int]]:
        """The shards that a pass has to be made for, whichever layers lack it."""
        found: dict[ForwardPass, set[int]] = {}
        for (one, _), missing in self.stores.items():
            found.setdefault(one, set()).update(missing)
        return found


@dataclass(frozen=True)
class ExtractionPlan:
    """One extraction: what to take of which images, and where to put it.

    Attributes:
        dataset: the images.
        backbone: the model.
        out: the folder that gets a store for each layer and pass.
        config: what to take, how; its `data` and `backbone` are open already, its timesteps the model's.
        texts: for each prompt policy but ``empty``, the texts of the images at given indices.
        provenance: further manifest fields (revision, compute_dtype, mode, ...).
        resume: go on with stores that are there.
        processes: this process and its like.
    """

    dataset: ImageDataset
    backbone: Backbone
    out: Path
    config: ExtractConfig
    texts: Mapping[str, Texts] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        """Refuse what can't be done.

        Raises:
            KeyError: an unknown layer.
            ValueError: a setting can't be, no images, a prompt policy without texts.
        """
        self.config.check()
        for layer in self.config.layers:
            if layer not in self.backbone.layers:
                known = ", ".join(self.backbone.layers)
                raise KeyError(f"unknown layer {layer!r} of {self.backbone.name}: it has {known}")
            if self.config.grid_pool != "mean" and self.backbone.layers[layer].kind == "tokens":
                raise ValueError(
                    f"layer {layer} of {self.backbone.name} gives tokens, not a grid: pool is "
                    f"{self.config.grid_pool!r}, tokens take mean"
                )
        if not len(self.dataset):
            raise ValueError(f"{self.dataset.name} has no images: choose another source or split")
        for prompt in self.config.prompts:
            if prompt != "empty" and prompt not in self.texts:
                raise ValueError(f"prompt policy {prompt!r} comes without its texts")

    def with_settings(self, **changes: Any) -> "ExtractionPlan":
        """The same with some of the config's fields changed."""
        return replace(self, config=replace(self.config, **changes))

    @property
    def batch_size(self) -> int:
        """Images a batch; where `auto` was not resolved, the default."""
        return DEFAULT_BATCH if self.config.batch_size == "auto" else self.config.batch_size

    @property
    def workers(self) -> int:
        """Processes that read ahead; where `auto` was not resolved, none."""
        return 0 if self.config.workers == "auto" else self.config.workers

    @cached_property
    def image_size(self) -> list[int]:
        """Height and width of what the model sees, in pixels."""
        return list(self.backbone.transform(Image.new("RGB", (64, 64))).shape[-2:])

    @cached_property
    def shard_images(self) -> int:
        """Images a shard: whole batches, so that no batch lies in two shards."""
        batch = self.batch_size
        wanted = self.config.shard_rows
        if wanted is None:
            image = sum(map(self.row_bytes, self.config.layers)) * len(self.config.passes())
            wanted = min(SHARD_IMAGES, OPEN_BYTES // image)
        return max(1, wanted // batch) * batch

    def row_bytes(self, layer: str) -> int:
        """Bytes of one image's row in a store of the layer."""
        spec = self.backbone.layers[layer]
        shape = self.config.row_shape(spec.channels, max(1, self.image_size[0] // spec.stride))
        names = 4 * shape[0] if self.config.cells else 0
        return torch.Size(shape).numel() * DTYPES[self.config.store_dtype].itemsize + names

    @cached_property
    def spans(self) -> list[range]:
        """The images of each shard."""
        size, total = self.shard_images, len(self.dataset)
        return [range(start, min(start + size, total)) for start in range(0, total, size)]

    @cached_property
    def targets(self) -> dict[tuple[ForwardPass, str], StoreWriter]:
        """The stores to make, by pass and layer."""
        return {
            (one, layer): StoreWriter(
                self.out / self.config.store_name(one, layer),
                self._common | self._settings(one, layer),
            )
            for one in self.config.passes()
            for layer in self.config.layers
        }

    @property
    def stores(self) -> list[Path]:
        """The folders of the stores, in the order of passes and layers."""
        return [target.path for target in self.targets.values()]

    @cached_property
    def _common(self) -> dict[str, Any]:
        """Manifest fields that every store of the run shares."""
        labels = self.dataset.labels
        crop = crop_of(self.backbone.transform)
        identity = json.dumps([list(self.dataset.ids), labels and [int(x) for x in labels]])
        return {
            "model": self.backbone.name,
            "revision": None,
            "compute_dtype": "float32",
            **self.provenance,
            "image_size": self.image_size,
            "crop": None if crop is None else asdict(crop),
            "dataset": self.dataset.name,
            "split": self.dataset.split,
            "classes": list(self.dataset.classes),
            "images": len(self.dataset),
            "dataset_sha256": hashlib.sha256(identity.encode()).hexdigest(),
            **self._contents,
            "shard_images": self.shard_images,
            "made_with": versions(),
        }

    @property
    def _contents(self) -> dict[str, Any]:
        """Hashes of the pictures' stored bytes, of all and of each shard; only the main process compares."""
        found = self.dataset.digests() if self.processes.main else None
        if found is None:
            return {CONTENTS: None, SHARD_CONTENTS: None}
        parts = [combined(found[span.start : span.stop])[:16] for span in self.spans]
        return {CONTENTS: combined(found), SHARD_CONTENTS: parts}

    def _settings(self, one: ForwardPass, layer: str) -> dict[str, Any]:
        noised = one.timestep is not None
        draws = one.draws[0] if len(one.draws) == 1 else list(one.draws)
        return {
            "kind": "activations",
            "layer": layer,
            "stride": self.backbone.layers[layer].stride,
            "timestep": one.timestep,
            "prompt_policy": one.prompt if noised else None,
            "pool": self.config.grid_pool,
            **({"cells_asked": self.config.cells} if self.config.cells else {}),
            "dtype": self.config.store_dtype,
            "seed": self.config.seed if noised or self.config.cells else None,
            "draw": draws if noised else None,
            "batch_size": self.batch_size,
        }

    @cached_property
    def cache(self) -> VAECache | None:
        """The cache of encoded images, if one is used."""
        if self.config.vae_cache is None:
            return None
        settings = {key: self._common[key] for key in CACHED}
        settings |= {"kind": "latents", "layer": "z0", "pool": "none", "dtype": "float16"}
        return VAECache(self.config.vae_cache, settings, self.dataset)

    def check(self) -> None:
        """See whether the stores may be made; writes nothing.

        Raises:
            ValueError: a store is there and ``resume`` is off, or it was made with other settings.
        """
        for target in self.targets.values():
            target.check(resume=self.resume)
        if self.cache is not None:
            self.cache.check(self.config.data.on_error)

    def lacking(self) -> "Lacking":
        """What is left to do, by all processes."""
        shards = len(self.spans)
        stores = {key: target.missing(shards) for key, target in self.targets.items()}
        return Lacking(stores, self.cache.target.missing(shards) if self.cache else set())

    def begin(self) -> list[Lock]:
        """Make the folders and write the settings down; gives the locks, to be held to the end."""
        locks = [self.cache.begin(self.backbone)] if self.cache is not None else []
        locks += [target.begin() for target in self.targets.values()]
        return [lock for lock in locks if lock is not None]

    def finish(self) -> None:
        """Write the manifests over the shards, which must all be there."""
        for target in self.targets.values():
            target.finish(len(self.spans))
        if self.cache is not None:
            self.cache.target.finish(len(self.spans))

    @torch.no_grad()
    def rows(self, batch: Encoded, one: ForwardPass) -> dict[str, Rows]:
        """The rows of one batch at one (timestep, prompt, draws), by layer.

        Pooled rows stay where they were computed until the shard is written, so that a CUDA device is not
        waited for; whole grids are moved to the CPU.
        """
        assert batch.encoded is not None
        texts, config = self.texts.get(one.prompt), self.config
        ids = [self.dataset.ids[index] for index in batch.indices]
        sums: dict[str, Tensor] = {}
        for draw in one.draws:
            grids = self.backbone.activations(
                batch.encoded,
                ids,
                config.layers,
                timestep=one.timestep,
                prompts=None if texts is None else texts(batch.indices),
                seed=config.seed,
                draw=draw,
            )
            for layer, grid in grids.items():
                rows = pooled(grid, config.grid_pool)
                sums[layer] = sums[layer] + rows if layer in sums else rows
        stored = {}
        for layer, rows in sums.items():
            mean, cells = (rows / len(one.draws)).to(DTYPES[config.store_dtype]), None
            if config.cells:
                grid = (mean.shape[2], mean.shape[3])
                places = random_cells(ids, grid, config.cells, config.seed)
                mean = cells_of(mean, places).flatten(0, 1).cpu()
                cells = Cells(places.flatten(0, 1).to(torch.int16), grid)
            stored[layer] = Rows(mean if mean.ndim == 2 else mean.cpu(), cells)
        return stored
