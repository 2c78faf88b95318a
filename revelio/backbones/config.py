"""The settings of a backbone: the one declaration that commands inherit and :func:`load_backbone` takes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from revelio.bounds import Device, PathFields, Pixels


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(PathFields):
    """The model whose activations are taken."""

    first: ClassVar[tuple[str, ...]] = ("name", "image_size", "device")

    name: str = "mini-sd"
    """A name that `revelio backbones` lists, a folder, or a hub id."""

    revision: str | None = None
    """The revision of a hub id."""

    image_size: Pixels | None = None
    """The side of the square the images are brought to, in pixels; none: the model's own."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The number format the model runs in."""

    attention: Literal["sdpa", "eager"] = "sdpa"
    """The attention kernel."""

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""
