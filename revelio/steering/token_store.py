"""Prompts -> activation stores of their tokens: a row a token position.

The id of a row is `PROMPT/POSITION`, with the prompt's own id. Shard i holds the tokens of the prompts
[i * size, (i + 1) * size), whatever was there before and however many processes share the work, so that an
interrupted run continues to the same bytes. The k-SAE trainer reads such a store as any other.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from revelio.activations.format import DTYPES, write_shard
from revelio.activations.writer import StoreWriter
from revelio.backbones.diffusion.pipeline_layers import PipelineLayers, Tokens
from revelio.distributed import Processes
from revelio.run_dir import versions
from revelio.steering.config import ExtractTextConfig
from revelio.steering.prompts import Prompt

# Tokens of this many prompts are encoded at once.
BATCH = 32


@dataclass(frozen=True)
class TokenExtraction:
    """Which tokens of which prompts to store, and where.

    Attributes:
        prompts: the prompts.
        source: the pipeline.
        config: which layers are stored, and how.
        processes: this process and its like.
    """

    prompts: Sequence[Prompt]
    source: PipelineLayers
    config: ExtractTextConfig
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        """Refuse what can't be done.

        Raises:
            KeyError: an unknown layer.
            ValueError: no prompts, no layers, or a layer that is no text encoder's.
        """
        if not self.prompts or not self.config.layers:
            raise ValueError("give at least one prompt and one layer")
        for layer in self.config.layers:
            if not all(self.source.is_text(part) for part in self.source.parts(layer)):
                raise ValueError(f"layer {layer} of {self.source.name} takes no text")

    @cached_property
    def spans(self) -> list[range]:
        """The prompts of each shard."""
        size, total = self.config.shard_prompts, len(self.prompts)
        return [range(first, min(first + size, total)) for first in range(0, total, size)]

    @cached_property
    def targets(self) -> dict[str, StoreWriter]:
        """The stores to make, by layer."""
        config = self.config
        identity = json.dumps([[one.id, one.text] for one in self.prompts])
        common = {
            "kind": "activations",
            "model": self.source.name,
            "revision": config.backbone.revision,
            "compute_dtype": config.backbone.dtype,
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(identity.encode()).hexdigest(),
            "shard_prompts": config.shard_prompts,
            "padding": config.padding,
            "dtype": config.store_dtype,
            "made_with": versions(),
        }
        return {
            layer: StoreWriter(config.out / layer, common | {"layer": layer})
            for layer in config.layers
        }

    def run(self) -> Iterator[tuple[int, int]]:
        """Make the stores; the manifests come last.

        Yields:
            How many prompts of how many this process has done, after each batch.

        Raises:
            ValueError: a store is there and ``resume`` is off, or it was made with other settings; or
                activations don't fit the stored dtype.
            OSError: a shard can't be written; those before it stay.
        """
        if not self.processes.main:
            yield from self._fill()
            return
        for target in self.targets.values():
            target.check(resume=self.config.resume)
        locks = [lock for target in self.targets.values() if (lock := target.begin()) is not None]
        try:
            yield from self._fill()
            for target in self.targets.values():
                target.finish(len(self.spans))
        finally:
            for lock in locks:
                lock.release()

    def _fill(self) -> Iterator[tuple[int, int]]:
        self.processes.wait()
        lacking = {layer: one.missing(len(self.spans)) for layer, one in self.targets.items()}
        shards = sorted(set().union(*lacking.values()))
        # By its number: a process that looks later finds the shards of a faster one no longer lacking.
        mine = [number for number in shards if number % self.processes.world == self.processes.rank]
        done, total = 0, sum(len(self.spans[number]) for number in mine)
        for number in mine:
            found = [layer for layer in self.config.layers if number in lacking[layer]]
            parts: dict[str, list[tuple[list[str], torch.Tensor]]] = {layer: [] for layer in found}
            span = self.spans[number]
            for first in span[::BATCH]:
                batch = self.prompts[first : min(first + BATCH, span.stop)]
                for layer in found:
                    tokens = self.source.tokens([one.text for one in batch], layer)
                    parts[layer].append(self._rows(batch, tokens))
                done += len(batch)
                yield done, total
            for layer in found:
                ids = [name for names, _ in parts[layer] for name in names]
                rows = torch.cat([rows for _, rows in parts[layer]])
                write_shard(self.targets[layer].path, number, rows, ids)
        self.processes.wait()

    def _rows(self, batch: Sequence[Prompt], tokens: Tokens) -> tuple[list[str], torch.Tensor]:
        """Ids and rows of a batch's tokens."""
        kept = torch.ones_like(tokens.content) if self.config.padding == "keep" else tokens.content
        names = [
            f"{one.id}/{place:03d}"
            for one, inside in zip(batch, kept, strict=True)
            for place in inside.nonzero().flatten().tolist()
        ]
        rows = tokens.states.cpu()[kept].to(DTYPES[self.config.store_dtype])
        if not rows.isfinite().all():
            raise ValueError(
                f"activations are not finite in {self.config.store_dtype}: store them in bfloat16"
            )
        return names, rows
