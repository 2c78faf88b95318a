"""Prompts -> activation stores of their tokens: a row a token position.

The id of a row is `PROMPT/POSITION`, with the prompt's own id. Shard i holds the tokens of the prompts
[i * size, (i + 1) * size), whatever was there before and however many processes share the work, so that an
interrupted run continues to the same bytes. The k-SAE trainer reads such a store as any other.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from revelio.activations.format import DTYPES, write_shard
from revelio.activations.writer import StoreWriter
from revelio.backbones.diffusion.pipeline_layers import PipelineLayers, Tokens
from revelio.distributed import Processes
from revelio.run_dir import versions
from revelio.steering.prompts import Prompt

Padding = Literal["drop", "keep"]
# Tokens of this many prompts are encoded at once.
BATCH = 32
SHARD_PROMPTS = 256


@dataclass(frozen=True)
class TokenExtraction:
    """Which tokens of which prompts to store, and where.

    Attributes:
        prompts: the prompts.
        source: the pipeline.
        layers: text layers; each gets a store.
        out: the folder of the stores.
        padding: whether the positions after the end of a text get rows.
        dtype: of the stored numbers.
        shard_prompts: prompts a shard.
        resume: go on with stores that are there.
        provenance: further manifest fields.
        processes: this process and its like.
    """

    prompts: Sequence[Prompt]
    source: PipelineLayers
    layers: Sequence[str]
    out: Path
    padding: Padding = "drop"
    dtype: str = "float32"
    shard_prompts: int = SHARD_PROMPTS
    resume: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        """Refuse what can't be done.

        Raises:
            KeyError: an unknown layer.
            ValueError: no prompts, no layers, or a layer that is no text encoder's.
        """
        if not self.prompts or not self.layers:
            raise ValueError("give at least one prompt and one layer")
        for layer in self.layers:
            if not all(self.source.is_text(part) for part in self.source.parts(layer)):
                raise ValueError(f"layer {layer} of {self.source.name} takes no text")

    @cached_property
    def spans(self) -> list[range]:
        """The prompts of each shard."""
        size, total = self.shard_prompts, len(self.prompts)
        return [range(first, min(first + size, total)) for first in range(0, total, size)]

    @cached_property
    def targets(self) -> dict[str, StoreWriter]:
        """The stores to make, by layer."""
        identity = json.dumps([[one.id, one.text] for one in self.prompts])
        common = {
            "kind": "activations",
            "model": self.source.name,
            **self.provenance,
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(identity.encode()).hexdigest(),
            "shard_prompts": self.shard_prompts,
            "padding": self.padding,
            "dtype": self.dtype,
            "made_with": versions(),
        }
        return {
            layer: StoreWriter(self.out / layer, common | {"layer": layer}) for layer in self.layers
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
            target.check(resume=self.resume)
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
        mine = shards[self.processes.rank :: self.processes.world]
        done, total = 0, sum(len(self.spans[number]) for number in mine)
        for number in mine:
            found = [layer for layer in self.layers if number in lacking[layer]]
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
        kept = torch.ones_like(tokens.content) if self.padding == "keep" else tokens.content
        names = [
            f"{one.id}/{place:03d}"
            for one, inside in zip(batch, kept, strict=True)
            for place in inside.nonzero().flatten().tolist()
        ]
        rows = tokens.states.cpu()[kept].to(DTYPES[self.dtype])
        if not rows.isfinite().all():
            raise ValueError(f"activations are not finite in {self.dtype}: store them in bfloat16")
        return names, rows
