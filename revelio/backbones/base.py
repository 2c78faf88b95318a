"""The one idea: every model, U-Net, DiT or ViT, is a Backbone that yields grids (b c h w)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from revelio.backbones.specs import LayerSpec as LayerSpec


class Backbone(Protocol):
    """A frozen model, cut after the last wanted layer.

    Attributes:
        name: what results call the model: its registered name, or the folder's or hub id's.
        layers: the layers it can yield, in order of depth.
        transform: a picture -> pixels (3 h w), with the model's own size and normalisation.
    """

    name: str
    layers: Mapping[str, LayerSpec]
    transform: Callable[[Image.Image], Float[Tensor, "3 h w"]]

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """What all passes share and a cache may keep: VAE latents z0; for a ViT the pixels as they are.

        The result is on the model's device in half precision (float16) where it is worth caching, so
        that features are the same from fresh and from cached latents.
        """
        ...

    def grids(
        self,
        encoded: Float[Tensor, "b c h w"],
        ids: Sequence[str],
        layers: Sequence[str],
        *,
        timestep: int | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> dict[str, Float[Tensor, "b c h w"]]:
        """The grids of ``layers``, all from one pass, in float32 on the model's device.

        Args:
            encoded: what :meth:`encode` gave, on any device.
            ids: the images' ids; noise is keyed by (seed, id, timestep, draw).
            layers: names out of ``self.layers``.
            timestep: the model's own training index; None for a model without noise.
            prompts: a text an image; None is the empty prompt (for DiT: the null class).
            seed: of the noise.
            draw: which of several noise draws.

        Raises:
            KeyError: an unknown layer; the message lists the known ones.
            ValueError: a timestep outside the schedule, or missing, or given to a ViT.
        """
        ...
