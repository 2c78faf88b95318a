"""Tokens inside a finished model as an activation store, for `revelio train-ksae`.

A row is a picture: the layer's tokens as a grid (d rows columns) of the tower's raster after a projector, and
(d T 1) for a layer of the language model, with T tokens a picture in their order. `--rows cells` makes each
token a row of the k-SAE. (A tower's own tokens are in its cache, which is such a store already.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_ext.called import called
from llava_ext.checkpoint import load_model
from llava_ext.config import IMAGE_INDEX, TokensConfig
from llava_ext.dataset import Collator, ConversationDataset, Pictures
from llava_ext.generate import FEWER
from llava_ext.images import damaged
from llava_ext.latents import ModelLayers, raster
from llava_ext.llava_json import Record, image_names, read_records, refuse
from llava_ext.model import LlavaModel
from llava_ext.tower_cache import CachedGrids
from llava_ext.towers import load_towers, look
from revelio.activations.format import write_shard
from revelio.activations.writer import StoreWriter
from revelio.backbones.hooks import read_layers
from revelio.data.contents import combined
from revelio.device_memory import placed
from revelio.distributed import device_of
from revelio.run_dir import versions
from revelio.trust import printable
from revelio.wording import plural

SHARD_IMAGES = 1024


@dataclass(frozen=True)
class TokenJob:
    """Which tokens of which model to store, opened and checked."""

    config: TokensConfig
    model: LlavaModel
    dataset: ConversationDataset
    collate: Collator

    @cached_property
    def writer(self) -> StoreWriter:
        """The store."""
        settings = {
            "kind": "activations",
            "model": called(self.config.model),
            "layer": self.config.layer,
            "pool": "none",
            "dtype": "float32",
            "images": len(self.dataset),
            "dataset_sha256": combined(repr(record) for record in self.dataset.records),
            "shard_images": SHARD_IMAGES,
            "made_with": versions(),
        }
        return StoreWriter(self.config.out, settings)

    @torch.no_grad()
    def rows(self, numbers: Sequence[int]) -> Tensor:
        """The layer's tokens of some records as grids."""
        samples = [self.dataset[number] for number in numbers]
        batch, device = self.collate(samples), self.model.device
        layer = self.config.layer
        pairs = zip(self.dataset.images.towers, batch.get("pixels", ()), strict=True)
        grids = batch.get("grids") or [
            look(tower, each.to(device), batch["image_ids"], batch["questions"])
            for tower, each in pairs
        ]
        inputs: dict[str, Any] = {
            name: batch[name].to(device) for name in ("input_ids", "attention_mask")
        }
        inputs |= {"labels": None, "grids": tuple(each.to(device) for each in grids)}
        found = read_layers(
            ModelLayers(self.model), [layer], lambda: self.model(**inputs), until=layer
        )[layer]
        found = found.float().cpu()
        if layer.startswith("block"):
            found = torch.stack(
                [self._image_part(*pair) for pair in zip(found, samples, strict=True)]
            )
            return found.transpose(1, 2)[..., None].contiguous()
        height, width = raster(self.model, layer)
        return found.transpose(1, 2).unflatten(2, (height, width)).contiguous()

    def _image_part(self, hidden: Tensor, sample: dict[str, Any]) -> Tensor:
        """The tokens of a sample that are its picture's."""
        first = sample["input_ids"].tolist().index(IMAGE_INDEX)
        return hidden[first : first + self.model.image_tokens]


def open_token_job(config: TokensConfig) -> TokenJob:
    """Load model, towers and data.

    Raises:
        KeyError: an unknown layer.
        ValueError: the data is wrong, or a record has not one picture.
    """
    records = _records(config)
    device = device_of(config.device)
    model, tokenizer = load_model(config.model, dtype=config.dtype)
    ModelLayers(model).module(config.layer)
    if config.layer.startswith("tower"):
        raise ValueError(
            f"{config.layer} is in the towers' cache already: train on its store, with rows cells"
        )
    known = model.config.transforms
    model.towers = load_towers(model.settings, config.device, config.allow, known)
    folder = config.data.images
    images = (
        CachedGrids.open(config.cache, model.towers, folder, image_names(records))
        if config.cache
        else Pictures(folder or Path(), model.towers)
    )
    dataset = ConversationDataset(
        records, tokenizer, model.settings, model.image_tokens, images,
        bad=config.bad_records, source=config.data.json,
    )  # fmt: skip
    pad: Any = tokenizer.pad_token_id
    collate = Collator(model.image_tokens, pad, images.stack)
    placed(model, device, f"the model at {printable(config.model)}", FEWER)
    return TokenJob(config, model, dataset, collate)


def _records(config: TokensConfig) -> list[Record]:
    """The records about one picture each; the pictures are looked into, unless a cache stands for them.

    Raises:
        ValueError: some can't be used, and are not left out.
    """
    data, seen = config.data, config.cache is None
    records = read_records(
        data.json, data.images, limit=config.limit, bad=config.bad_records, files=seen,
        decode=partial(damaged, cache=config.out) if seen else None,
    )  # fmt: skip
    wrong = [
        (repr(one.id), f"record {one.id!r} has {plural(len(one.images), 'picture')}: give one each")
        for one in records
        if len(one.images) != 1
    ]
    refuse(wrong, len(records), config.bad_records, data.json)
    return [one for one in records if len(one.images) == 1]


def fill(job: TokenJob) -> Iterator[int]:
    """Write the store, and go on with one that was stopped.

    Yields:
        How many records are done, after each batch.
    """
    job.writer.check(resume=True)
    lock, total = job.writer.begin(), len(job.dataset)
    if lock is None:
        return
    shards = [range(a, min(a + SHARD_IMAGES, total)) for a in range(0, total, SHARD_IMAGES)]
    try:
        for number in sorted(job.writer.missing(len(shards))):
            parts, size = [], job.config.batch_size
            for first in shards[number][::size]:
                some = range(first, min(first + size, shards[number].stop))
                parts.append(job.rows(some))
                yield some.stop
            ids = [job.dataset.records[i].id for i in shards[number]]
            write_shard(job.writer.path, number, torch.cat(parts), ids)
        job.writer.finish(len(shards))
    finally:
        lock.release()
