"""A cache of encoded images (VAE latents z0) on disk, so that later timesteps need no VAE.

The VAE is 58 % of the work of one pass of SD-1.5 at 512 px (SPEC 6), its result 32 KB an image in half
precision. The cache is an activation store of kind ``latents``, tied to the model, the encoder (by a
probe picture), the data set, and the image size.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from revelio.activations.encode import Encoded, encode
from revelio.activations.format import read_activations, read_header, read_ids, shard_name
from revelio.activations.manifest import read_manifest
from revelio.activations.store import ActivationStore
from revelio.activations.writer import CONTENTS, StoreWriter
from revelio.backbones.base import Backbone
from revelio.data.dataset import ImageDataset
from revelio.lock import Lock
from revelio.seeds import generator
from revelio.trust import printable

# A probe in bfloat16 or on another device is off by less; another encoder's by far more.
PROBE_TOLERANCE = 0.02
PROBE = "probe"


def cacheable(backbone: Backbone) -> bool:
    """Whether a model encodes images to something worth caching: latents, not pixels."""
    return _probe(backbone).dtype == torch.float16


def probe_encoder(backbone: Backbone) -> list[float]:
    """A few numbers that another transform or encoder would not give: 2x2 means of a probe's z0."""
    encoded = _probe(backbone)
    if encoded.dtype != torch.float16:
        raise ValueError(
            f"{backbone.name} has no half-precision latents worth caching: leave vae_cache out"
        )
    return [round(x, 4) for x in adaptive_avg_pool2d(encoded.float().cpu(), 2).flatten().tolist()]


def _probe(backbone: Backbone) -> Tensor:
    """What a picture of noise, always the same, is encoded to."""
    noise = torch.randint(0, 256, (12, 16, 3), generator=generator("latent probe"))
    picture = Image.fromarray(noise.numpy().astype(np.uint8)).resize(
        (160, 120), Image.Resampling.NEAREST
    )
    encoded = encode(backbone, backbone.transform(picture)[None])
    assert encoded is not None
    return encoded


class VAECache:
    """The latents of a data set; shards that are missing are written as they are made."""

    def __init__(self, path: Path, settings: Mapping[str, Any], dataset: ImageDataset) -> None:
        self.target = StoreWriter(path, settings)
        self._dataset = dataset
        self._store: ActivationStore | None = None
        self._row: dict[str, int] = {}

    @property
    def path(self) -> Path:
        """The folder of the cache."""
        return self.target.path

    def begin(self, backbone: Backbone) -> Lock | None:
        """Tie the cache to the encoder, or see that it is tied to the same; gives its lock, as a store's.

        Raises:
            ValueError: it was made with other settings or by another encoder.
        """
        probe = probe_encoder(backbone)
        lock = StoreWriter(self.path, {**self.target.settings, PROBE: probe}).begin()
        was = self.target.written_settings().get(PROBE, [])
        scale = max(1.0, *map(abs, probe))
        off = [abs(a - b) / scale for a, b in zip(was, probe, strict=False)]
        if len(was) != len(probe) or max(off) > PROBE_TOLERANCE:
            raise ValueError(
                f"{self.path} holds latents of another encoder (VAE) or transform than "
                f"{backbone.name}'s: choose another folder"
            )
        return lock

    def shard(self, number: int, span: range, batch_size: int) -> Iterator[Encoded]:
        """The cached batches of the shard that covers ``span``.

        Raises:
            ValueError: the cache was cut or edited.
        """
        if self._store is None and self.target.finished:
            self._store = ActivationStore.open(self.path)
            self._row = {name: row for row, name in enumerate(self._store.ids)}
        if self._store is not None:
            rows = self._finished_rows(self._store, span)
            skipped = [(name, reason) for name, reason in self._store.manifest["skipped"]]
        else:
            path = self.path / shard_name(number)
            skipped = list(read_header(path).skipped)
            latents = read_activations(path, 0, len(span))
            rows = {name: latents[row] for row, name in enumerate(read_ids(path))}
        reasons = dict(skipped)
        for start in range(span.start, span.stop, batch_size):
            chunk = range(start, min(start + batch_size, span.stop))
            kept = [index for index in chunk if self._dataset.ids[index] in rows]
            lost = [self._dataset.ids[index] for index in chunk if index not in kept]
            unknown = [name for name in lost if name not in reasons]
            if unknown:
                raise ValueError(
                    f"{self.path} holds neither image {printable(unknown[0])} nor why it was "
                    f"skipped: choose another folder"
                )
            encoded = [rows[self._dataset.ids[index]] for index in kept]
            yield Encoded(
                kept,
                torch.stack(encoded) if encoded else None,
                [(name, reasons[name]) for name in lost],
            )

    def _finished_rows(self, store: ActivationStore, span: range) -> dict[str, Tensor]:
        """The latents of a span by id."""
        found = [name for name in (self._dataset.ids[i] for i in span) if name in self._row]
        if not found:
            return {}
        first = self._row[found[0]]
        if [self._row[name] for name in found] != list(range(first, first + len(found))):
            raise ValueError(f"{self.path} holds images in another order: choose another folder")
        return dict(zip(found, store.rows(first, first + len(found)), strict=True))

    def check(self, on_error: str) -> None:
        """Refuse a cache of other images, or one that lacks images where these are to stop the run.

        Raises:
            ValueError: it was made with other settings, or lacks an image; the message names it.
        """
        self.target.check(resume=True)
        if self.target.started and CONTENTS not in self.target.written_settings():
            warnings.warn(
                f"{self.path} was made before the contents of pictures were recorded: only their "
                "names are compared",
                stacklevel=2,
            )
        skipped = self._skipped() if on_error == "stop" else []
        if skipped:
            raise ValueError(
                f"{self.path} was made without image {skipped[0][0]} ({skipped[0][1]}): "
                "skip unreadable images (on_error), or mend the image and make the cache again"
            )

    def _skipped(self) -> list[tuple[str, str]]:
        if self.target.finished:
            return [(name, reason) for name, reason in read_manifest(self.path).skipped]
        shards = sorted(self.path.glob(shard_name(0)[:6] + "*"))
        return [pair for shard in shards for pair in read_header(shard).skipped]
