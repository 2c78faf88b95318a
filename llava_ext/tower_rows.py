"""What a tower cache keeps of an image, and how the tower's grid comes of it again.

    grids      the grid (c h w) in float16, averaged to the budget where the tower's tokens are ``pool``
    int8       the same as round(127 x / s), with s the largest |x| of each channel of the image
    latents    what the tower starts from: a VAE's latents in float16, else the picture itself in 8 bits;
               and the picture's name, which keys the noise

``grids`` and ``int8`` need no tower in training. From ``latents`` it runs in every step, after the VAE: for
CC595k and SD-1.5 at 512 px they take 20 GB where the grids take 1.56 TB, and they serve all timesteps and
prompts. ``int8`` and ``latents`` are stored as bytes, a row of them an image.
"""

from collections.abc import Sequence
from functools import cached_property
from math import isqrt, prod
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from llava_ext.config import QUESTION, Keep, TowerConfig
from llava_ext.images import NAME_BYTES, split_pixels
from llava_ext.towers import BackboneTower, Tower, plain_transforms

# Kept latents are of all noise and all prompts.
OF_THE_NOISE = ("timestep", "timesteps", "draw", "seed", "prompt")
SCALE_BYTES = 4


def store_name(config: TowerConfig, keep: Keep = "grids") -> str:
    """The folder of a tower's store inside a cache.

    Raises:
        ValueError: what is kept depends on more than the picture.
    """
    if config.prompt == QUESTION and keep != "latents":
        raise ValueError(
            f"tower {config.backbone} {config.layer} is prompted by the question, so a picture's grid "
            "differs with what is asked: keep its latents (`keep: latents`), or train without a cache"
        )
    parts = [config.backbone.rstrip("/").rpartition("/")[2].replace(":", "-"), config.layer]
    if keep == "latents":
        return "-".join([*parts, keep])
    if config.timestep is not None:
        parts += [f"t{config.timestep}", f"d{config.draw}"]
    if config.timesteps:
        parts += [f"t{'-'.join(map(str, config.timesteps))}", f"d{config.draw}"]
    if config.tokens == "pool":
        parts.append(f"pool{isqrt(config.budget)}")
    return "-".join(parts if keep == "grids" else [*parts, keep])


class KeptTower:
    """A tower whose pixels are rows of a cache.

    Attributes:
        tower: the tower itself.
        keep: what is kept.
        config: the tower's.
        channels: of its grid.
        grid: height and width of the grid.
    """

    def __init__(self, tower: Tower, keep: Keep) -> None:
        """A tower and what is kept of it.

        Raises:
            ValueError: it has no latents that could be kept.
        """
        self.tower, self.keep = tower, keep
        self.config, self.channels, self.grid = tower.config, tower.channels, tower.grid
        self.name = store_name(tower.config, keep)
        self.dtype = "float16" if keep == "grids" else "uint8"
        self._transforms = plain_transforms([tower])
        if keep == "latents" and not self._transforms:
            raise ValueError(
                f"tower {tower.config.backbone} {tower.config.layer} has no image processing of its own that "
                "is known here, so only its grids can be kept: choose `keep` grids or int8"
            )

    @cached_property
    def _start(self) -> Tensor:
        """What the tower starts from, of one picture that doesn't matter."""
        return self._encode(self.tower.pixels(Image.new("RGB", (8, 8)))[None])

    @property
    def pool(self) -> int | str:
        """The side that grids are averaged to, or ``none``."""
        pooled = self.config.tokens == "pool" and self.keep != "latents"
        return isqrt(self.config.budget) if pooled else "none"

    @property
    def _raster(self) -> tuple[int, int]:
        """Height and width of the grids that are kept."""
        side = isqrt(self.config.budget)
        return (side, side) if self.config.tokens == "pool" else self.grid

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of what is kept of an image."""
        if self.keep == "latents":
            return (self._start[0].numel() * self._start.element_size() + NAME_BYTES,)
        height, width = self._raster
        if self.keep == "int8":
            return (self.channels, height * width + SCALE_BYTES)
        return (self.channels, height, width)

    @property
    def row_bytes(self) -> int:
        """Bytes of an image."""
        return prod(self.row_shape) * (2 if self.keep == "grids" else 1)

    def identity(self) -> dict[str, Any]:
        """Of the tower, as far as what is kept depends on it."""
        known = self.tower.identity()
        left_out = OF_THE_NOISE if self.keep == "latents" else ()
        return {name: value for name, value in known.items() if name not in left_out}

    def rows(self, pixels: Float[Tensor, "i 3 h w"], ids: Sequence[str]) -> Shaped[Tensor, "i ..."]:
        """What is kept of some images, on the CPU.

        Raises:
            ValueError: a value doesn't fit float16.
        """
        if self.keep == "latents":
            start = self._encode(pixels).cpu().flatten(1).contiguous().view(torch.uint8)
            names = torch.tensor([list(bytes.fromhex(name)) for name in ids], dtype=torch.uint8)
            return torch.cat([start, names.view(-1, NAME_BYTES)], dim=1)
        grids = self._averaged(self.tower.grids(pixels, ids))
        return grids.half().cpu() if self.keep == "grids" else _quantized(grids).cpu()

    def names(self, rows: UInt8[Tensor, "i n"]) -> list[str]:
        """The pictures' names in rows of latents."""
        return [bytes(row).hex() for row in rows[:, -NAME_BYTES:].tolist()]

    def grids(
        self,
        pixels: Shaped[Tensor, "i ..."],
        ids: Sequence[str] = (),
        questions: Sequence[str] | None = None,
    ) -> Float[Tensor, "i c h w"]:
        """Grids of rows; only latents need ids, and of a tower that is prompted by them, questions."""
        if self.keep == "grids":
            return pixels
        if self.keep == "int8":
            return _restored(pixels).unflatten(2, self._raster)
        own, start = cast(BackboneTower, self.tower), pixels[:, :-NAME_BYTES].contiguous()
        if not len(start):
            return torch.empty(0, self.channels, *self.grid)
        if self._start.dtype == torch.uint8:
            return own.grids_of(
                own.encode(split_pixels(start, self._transforms)[0]), ids, questions
            )
        latents = start.view(self._start.dtype).unflatten(1, self._start.shape[1:])
        return own.grids_of(latents, ids, questions)

    def pixels(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """The tower's own."""
        return self.tower.pixels(image)

    def _encode(self, pixels: Float[Tensor, "i 3 h w"]) -> Tensor:
        """Latents in float16; where the tower has none worth keeping, the picture in 8 bits."""
        encoded = cast(BackboneTower, self.tower).encode(pixels)
        if encoded.dtype == torch.float16:
            return encoded
        mean, std = (
            torch.tensor(self._transforms[0][name])[:, None, None] for name in ("mean", "std")
        )
        return ((pixels.cpu() * std + mean) * 255).round().to(torch.uint8)

    def _averaged(self, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i c y x"]:
        """Grids of the size in which they are kept; float16 must hold them.

        Raises:
            ValueError: it doesn't.
        """
        if grids.shape[-2:] != self._raster:
            grids = adaptive_avg_pool2d(grids.float(), self._raster)
        if not torch.isfinite(grids.half()).all():
            raise ValueError(
                f"tower {self.config.backbone} {self.config.layer} gives values up to "
                f"{grids.abs().max().item():.3g}, which float16 can't hold: train without a cache"
            )
        return grids


def _quantized(grids: Float[Tensor, "i c h w"]) -> UInt8[Tensor, "i c n"]:
    """Whole numbers from -127 to 127 as bytes, and after each channel's its step in float32."""
    cells = grids.float().flatten(2)
    step = cells.abs().amax(2, keepdim=True) / 127
    whole = (cells / step.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return torch.cat([whole.view(torch.uint8), step.contiguous().view(torch.uint8)], dim=2)


def _restored(rows: UInt8[Tensor, "i c n"]) -> Float[Tensor, "i c hw"]:
    """The opposite of :func:`_quantized`, up to half a step."""
    whole = rows[..., :-SCALE_BYTES].contiguous().view(torch.int8)
    return whole * rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
