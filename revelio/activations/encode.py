"""Encoded images, shard by shard, fresh from the data set; and how a layer's grids become rows.

Shard i is always the images ``[i * size, (i + 1) * size)`` of the data set, cut into the same batches, so
that what is computed for it depends on nothing that came before.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from revelio.activations.config import Pool
from revelio.backbones.base import Backbone
from revelio.data.dataset import ImageDataset
from revelio.data.loading import batches
from revelio.seeds import generator


@dataclass(frozen=True)
class Encoded:
    """A batch of encoded images.

    Attributes:
        indices: the data set's index of each image.
        encoded: what ``Backbone.encode`` gave; None where every image of the batch was skipped.
        skipped: id and reason of each image of the batch that could not be read.
    """

    indices: list[int]
    encoded: Float[Tensor, "b c h w"] | None
    skipped: list[tuple[str, str]]


class FreshImages:
    """Reads the images of some shards in one stream and encodes them batch by batch.

    The shards must be asked for in the order given, each to its end. Labels and ids are looked up by index
    afterwards, so that a skipped image can't move another's row against its label.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        backbone: Backbone,
        spans: Sequence[range],
        *,
        batch_size: int,
        workers: int = 0,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        self._backbone = backbone
        # Every shard but the data set's last is a whole number of batches: one stream never mixes two.
        assert all(len(s) % batch_size == 0 or s.stop == len(dataset) for s in spans)
        self._stream = batches(
            dataset,
            backbone.transform,
            batch_size,
            indices=[index for span in spans for index in span],
            workers=workers,
            on_error=on_error,
        )
        self._batch_size = batch_size

    def shard(self, span: range) -> Iterator[Encoded]:
        """The batches of the shard that covers ``span``."""
        for batch in islice(self._stream, ceil(len(span) / self._batch_size)):
            assert all(index in span for index in batch.indices), "a batch crosses a shard"
            yield Encoded(batch.indices, encode(self._backbone, batch.pixels), batch.skipped)


@torch.no_grad()
def encode(backbone: Backbone, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"] | None:
    """The encoded images; None for no images."""
    return backbone.encode(pixels) if len(pixels) else None


def pooled(grid: Float[Tensor, "b ..."], pool: Pool) -> Shaped[Tensor, "b ..."]:
    """Grids (b c h w), or tokens (b t d) where ``pool`` is ``mean``, as rows, in float32."""
    whole = grid.float()
    if whole.ndim == 3:
        return whole.mean(dim=1)
    if pool == "mean":
        return whole.mean(dim=(2, 3))
    if pool == "none":
        return whole
    height, width = whole.shape[2:]
    return adaptive_avg_pool2d(whole, (min(pool, height), min(pool, width)))


def draws_of(about: Mapping[str, Any]) -> list[int]:
    """The noise draws that a store's manifest says its rows are the mean of; one draw, 0, without noise."""
    draw = about.get("draw") or 0
    return draw if isinstance(draw, list) else [draw]


@torch.no_grad()
def grids_as_stored(
    backbone: Backbone,
    encoded: Float[Tensor, "b c y x"],
    ids: Sequence[str],
    about: Mapping[str, Any],
) -> Float[Tensor, "b d h w"]:
    """The grids of other images, made as those of a store were: the mean over its draws, in float32.

    Averaged to a side where the store's are; whole where it holds one vector an image.

    Args:
        backbone: the store's model.
        encoded: what ``backbone.encode`` gave.
        ids: the images' ids, which key the noise.
        about: the store's manifest; its prompts are empty.
    """
    layer, draws = about["layer"], draws_of(about)
    found = [
        backbone.activations(
            encoded,
            ids,
            [layer],
            timestep=about.get("timestep"),
            seed=about.get("seed") or 0,
            draw=draw,
        )[layer].float()
        for draw in draws
    ]
    mean = sum(found[1:], start=found[0]) / len(draws)
    side = about.get("pool")
    return pooled(mean, side if isinstance(side, int) else "none")


def random_cells(
    ids: Sequence[str], grid: tuple[int, int], count: int, seed: int
) -> Int64[Tensor, "b c 2"]:
    """Distinct random cells (y, x) of each image's grid, in the order of reading; all of a small grid's.

    An image's cells depend on ``seed`` and its id alone, so that they are the same in every batch, process,
    layer of the same grid, timestep and draw.
    """
    height, width = grid
    kept = min(count, height * width)
    drawn = [torch.randperm(height * width, generator=generator(seed, "cells", x)) for x in ids]
    chosen = torch.stack([one[:kept].sort().values for one in drawn])
    return torch.stack([chosen // width, chosen % width], dim=2)


def cells_of(
    grids: Shaped[Tensor, "b d h w"], places: Int64[Tensor, "b c 2"]
) -> Shaped[Tensor, "b c d"]:
    """The vectors of grids at places (y, x)."""
    flat = places[..., 0] * grids.shape[3] + places[..., 1]
    flat = flat.to(grids.device, non_blocking=not flat.is_cuda)
    index = flat[:, None].expand(-1, grids.shape[1], -1)
    return grids.flatten(2).gather(2, index).transpose(1, 2)
