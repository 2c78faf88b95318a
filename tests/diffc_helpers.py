"""Small stand-ins for Diff-C's tests: separable grids, class folders, a backbone of one formula."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from revelio.backbones.base import LayerSpec
from revelio.data.dataset import ImageDataset
from revelio.data.transforms import SquareTransform
from revelio.seeds import generator

COLOURS = {"blue": (30, 40, 220), "green": (30, 200, 40), "red": (220, 40, 30)}


def separable(per_class: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Grids (n 6 4 4) whose class is the channel that stands out, under noise."""
    labels = [label for label in range(classes) for _ in range(per_class)]
    grids = torch.randn(len(labels), 6, 4, 4, generator=generator(seed, "toy"))
    for row, label in enumerate(labels):
        grids[row, label] += 4.0
    return grids, labels


def picture(name: str, number: int) -> Image.Image:
    """A noisy square of one colour, 24 px."""
    noise = np.random.default_rng(number).normal(0, 20, (24, 24, 3))
    return Image.fromarray(np.clip(noise + COLOURS[name], 0, 255).astype(np.uint8))


def write_folders(root: Path, per_class: int, start: int = 0) -> Path:
    """``root/<colour>/<n>.png``; the folder of class folders."""
    for name in COLOURS:
        (root / name).mkdir(parents=True)
        for number in range(start, start + per_class):
            picture(name, number).save(root / name / f"{number}.png")
    return root


def toy_dataset(per_class: int = 4) -> ImageDataset:
    """The same pictures without files."""
    names = list(COLOURS)
    pairs = [(name, number) for name in names for number in range(per_class)]
    return ImageDataset(
        name="toy",
        split=None,
        classes=tuple(names),
        ids=[f"{name}/{number}.png" for name, number in pairs],
        labels=[names.index(name) for name, _ in pairs],
        read=lambda index: picture(*pairs[index]),
    )


class FormulaBackbone:
    """Layer ``mix``: means of 8x8 pixels plus noise keyed by (seed, id, timestep, draw)."""

    name = "formula"

    def __init__(self) -> None:
        self.layers = {"mix": LayerSpec(3, 8)}
        self.transform = SquareTransform(16)
        self.images = 0
        self.prompts: list[str] | None = None

    def encode(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return pixels

    def activations(
        self,
        encoded: Tensor,
        ids: Sequence[str],
        layers: Sequence[str],
        *,
        timestep: int | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> dict[str, Tensor]:
        self.prompts = None if prompts is None else list(prompts)
        means = encoded.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(-1, -2))
        noise = [noise_of(seed, name, timestep, draw) for name in ids]
        return {layer: means + torch.stack(noise) for layer in layers}


def noise_of(seed: int, name: str, timestep: int | None, draw: int) -> Tensor:
    """The noise of one image."""
    stream = generator(seed, "noise", name, timestep or 0, draw)
    return torch.randn(3, 2, 2, generator=stream) * 0.1
