"""The picture itself as activations: what is reached with no backbone at all, the baseline to beat."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor, nn

from revelio.backbones.base import LayerSpec
from revelio.data.transforms import SquareTransform

CHANNELS = 3
SIZE, SIDE = 64, 16


class PixelsBackbone:
    """A backbone whose layers are the picture, brought down to (3, side, side).

    ``pixels`` is that grid, ``flat`` the same numbers as the one cell of a grid (3 side side, 1, 1): a k-SAE
    of pooled activations sees the whole picture in it.

    Args:
        size: side of the square the pictures are cropped to, in pixels.
        side: side of the grid; ``size`` must be a multiple of it.

    Raises:
        ValueError: ``size`` is no multiple of ``side``.
    """

    name = "pixels"

    def __init__(self, size: int = SIZE, side: int = SIDE) -> None:
        if side < 1 or size % side:
            raise ValueError(f"pixels of {size} can't become a {side}x{side} grid: give a multiple")
        self.stride = size // side
        self.layers: Mapping[str, LayerSpec] = {
            "pixels": LayerSpec(CHANNELS, self.stride),
            "flat": LayerSpec(CHANNELS * side * side, size),
        }
        self.transform = SquareTransform(size)
        pool = nn.AvgPool2d(self.stride)
        flat = nn.Sequential(pool, nn.Flatten(), nn.Unflatten(1, (CHANNELS * side * side, 1, 1)))
        self._modules = {"pixels": pool, "flat": flat}

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The pixels as they are."""
        return pixels

    def activations(
        self,
        encoded: Float[Tensor, "b 3 h w"],
        ids: Sequence[str],
        layers: Sequence[str],
        *,
        timestep: int | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> dict[str, Float[Tensor, "b c h w"]]:
        """The means of ``stride`` x ``stride`` pixels.

        Raises:
            KeyError: an unknown layer.
            ValueError: a timestep, of which pixels have none.
        """
        if timestep is not None:
            raise ValueError("pixels have no timestep: give none (None)")
        return {layer: self.module(layer)(encoded) for layer in layers}

    def module(self, layer: str) -> nn.Module:
        """The pooling whose output the layer is.

        Raises:
            KeyError: an unknown layer.
        """
        if layer not in self.layers:
            raise KeyError(f"pixels have no layer {layer!r}: choose from {', '.join(self.layers)}")
        return self._modules[layer]
