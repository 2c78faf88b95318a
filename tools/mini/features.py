"""Activations of a backbone by layer and timestep, for the linear probe and for k-SAEs.

A grid is averaged to 4x4 for the probe, which may use where things are, and to one vector for the
k-SAE, as everywhere else in Revelio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from revelio.backbones.base import Backbone
from tools.mini.data import PictureSet, to_pixels

CELLS = 4
BATCH = 100


@dataclass(frozen=True)
class Activations:
    """Of one layer at one timestep: `cells (n, d * 16)` and `pooled (n, d)`."""

    cells: torch.Tensor
    pooled: torch.Tensor


def ids_of(pictures: PictureSet, rows: torch.Tensor, split: str) -> list[str]:
    """Ids that noise is keyed by: data set, split and row."""
    return [f"{pictures.name}/{split}/{row:05d}" for row in rows.tolist()]


@torch.no_grad()
def activations(
    backbone: Backbone,
    pixels: torch.Tensor,
    ids: list[str],
    layers: list[str],
    timestep: int | None,
    seed: int = 0,
) -> dict[str, Activations]:
    """Activations of all layers from one pass, under the empty prompt.

    Args:
        backbone: Any backbone.
        pixels: `(n, 3, h, w)` as the backbone's own transform gives them.
        ids: The images' ids.
        layers: Names of its layers.
        timestep: None for a model without noise.
        seed: Of the noise.
    """
    cells: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    pooled: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(pixels), BATCH):
        part = slice(start, start + BATCH)
        encoded = backbone.encode(pixels[part])
        grids = backbone.activations(encoded, ids[part], layers, timestep=timestep, seed=seed)
        for layer, grid in grids.items():
            side = min(CELLS, grid.shape[-1])
            cells[layer].append(F.adaptive_avg_pool2d(grid, side).flatten(1))
            pooled[layer].append(grid.mean((2, 3)))
    return {
        layer: Activations(torch.cat(cells[layer]), torch.cat(pooled[layer])) for layer in layers
    }


def as_picture(image: torch.Tensor) -> Image.Image:
    """A uint8 picture `(1 or 3, h, w)` in RGB, for a backbone's own transform."""
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def pixel_rows(images: torch.Tensor, side: int) -> np.ndarray:
    """The baseline without any model: pixels `(n, 3 or 1 * side * side)`, shrunk to `side`."""
    pixels = to_pixels(images, side) if images.shape[1] == 3 else to_pixels(images, side)[:, :1]
    return pixels.flatten(1).numpy()


class PooledRows:
    """Rows in memory that look to k-SAE training and `top_images` like a store of activations."""

    def __init__(self, rows: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...]) -> None:
        self.table = rows
        self.labels = labels
        self.classes = classes
        self.row_shape = tuple(rows.shape[1:])
        self.manifest: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop`."""
        return self.table[start:stop]

    def batches(self, size: int):
        """Pairs of a batch's first row and its rows."""
        for start in range(0, len(self), size):
            yield start, self.table[start : start + size]
