"""A tiny deterministic backbone, a data set in memory, and what tests compare stores by."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from revelio.backbones.base import LayerSpec
from revelio.data.dataset import ImageDataset, ImageError
from revelio.seeds import generator

SIDE = 16

# Two layers, two timesteps, two draws: eight stores of three shards.
SETTINGS = {
    "layers": ("deep", "wide"),
    "timesteps": (25, 200),
    "draws": 2,
    "seed": 3,
    "batch_size": 2,
    "shard_rows": 4,
}


class FakeBackbone:
    """Two layers of a fixed random convolution over noised, half-sized pixels; counts its work."""

    def __init__(self, name: str = "fake", encoder: float = 1.0) -> None:
        self.name = name
        self.layers = {"deep": LayerSpec(6, 4), "wide": LayerSpec(4, 2)}
        source = generator("fake weights")
        self.weights = {
            "deep": torch.randn(6, 3, 2, 2, generator=source),
            "wide": torch.randn(4, 3, 1, 1, generator=source),
        }
        self.encoder = encoder
        self.encoded = 0
        self.passes: list[tuple[int | None, int, tuple[str, ...]]] = []
        self.prompts: list[str] = []

    def transform(self, image: Image.Image) -> Tensor:
        array = np.asarray(image.convert("RGB").resize((SIDE, SIDE))).copy()
        return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1

    def encode(self, pixels: Tensor) -> Tensor:
        self.encoded += len(pixels)
        return (self.encoder * torch.nn.functional.avg_pool2d(pixels, 2)).half()

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
        if timestep is not None and not 0 <= timestep < 1000:
            raise ValueError(f"timestep {timestep} is outside 0..999")
        self.passes.append((timestep, draw, tuple(ids)))
        clean = encoded.float()
        if timestep is not None:
            noise = [
                torch.randn(clean.shape[1:], generator=generator(seed, name, timestep, draw))
                for name in ids
            ]
            clean = clean + timestep / 1000 * torch.stack(noise)
        if prompts is not None:
            self.prompts += prompts
            clean = clean + torch.tensor([len(text) for text in prompts])[:, None, None, None]
        return {
            layer: torch.nn.functional.conv2d(
                clean, self.weights[layer], stride=self.weights[layer].shape[-1]
            )
            for layer in layers
        }


def picture(index: int) -> Image.Image:
    """A picture that no other index gives."""
    pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator("picture", index))
    return Image.fromarray(pixels.numpy().astype(np.uint8))


def memory_dataset(
    count: int, *, broken: Sequence[int] = (), labelled: bool = True
) -> ImageDataset:
    """``count`` pictures in memory; those in ``broken`` can't be read."""
    ids = [f"class {index % 3}/{index:03d}.png" for index in range(count)]

    def read(index: int) -> Image.Image:
        if index in broken:
            raise ImageError(ids[index], "it is cut off")
        return picture(index)

    return ImageDataset(
        name="memory",
        split=None,
        classes=("a", "b", "c") if labelled else (),
        ids=ids,
        labels=[index % 3 for index in range(count)] if labelled else None,
        read=read,
    )
