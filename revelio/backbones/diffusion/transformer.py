"""What the transformers on patches of latents share: loading, cutting, and tokens put on the grid.

The layers are ``block0`` ..., the output of each block: tokens (b t c), row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from revelio.backbones.diffusion.base import DiffusionBackbone, Request, Shape
from revelio.backbones.layers import dit_layers, vae_stride
from revelio.backbones.source import Source
from revelio.wording import plural

if TYPE_CHECKING:
    from torch import Tensor, nn

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.vae import LatentSpace

NEEDED: dict[str, type] = dict.fromkeys(
    (
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "patch_size",
        "sample_size",
        "in_channels",
    ),
    int,
)

T = TypeVar("T", bound="nn.Module")


class TransformerBackbone(DiffusionBackbone):
    """A transformer with its VAE, whatever it is conditioned on.

    Attributes:
        transformer: the transformer.
        latents: the VAE.
    """

    kind = "DiT"

    def __init__(self, transformer: Any, latents: LatentSpace, **common: Any) -> None:
        super().__init__(**common)
        self.transformer = transformer
        self.latents = latents

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        return self.transformer

    def layer_module(self, layer: str) -> nn.Module:
        """One of the transformer's blocks."""
        return self.transformer.transformer_blocks[int(layer.removeprefix("block"))]

    def as_grid(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Tokens on the grid of their patches."""
        from revelio.backbones.hooks import tokens_to_grid

        patch = self.transformer.config["patch_size"]
        height, width = (side // patch for side in x_t.shape[-2:])
        return tokens_to_grid(output, height, width)

    def inputs(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The transformer's arguments beside latents and timestep."""
        return conditioning.arguments()

    def denoise(self, x_t: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's prediction; a learned variance, the channels behind it, is left out."""
        output = self.transformer(x_t, timestep=times, **self.inputs(x_t, conditioning)).sample
        return output[:, : x_t.shape[1]]


def transformer_configs(
    source: Source, kind: str | tuple[str, ...], **needed: type
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the transformer and the VAE.

    Args:
        source: the model.
        kind: the transformer's class, or those that it may be of.
        needed: what its config must say beside its size; see :meth:`Source.check`.

    Raises:
        ValueError: one is missing, of another class, says no size, or they don't fit.
    """
    config = source.part_config("transformer", kind, NEEDED | needed)
    vae = source.vae_config()
    if config["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"the transformer of {source.name} takes {plural(config['in_channels'], 'channel')}, its VAE "
            f"gives {vae['latent_channels']}: they belong to different models"
        )
    return config, vae


def transformer_shape(config: Mapping[str, Any], vae: Mapping[str, Any]) -> Shape:
    """What the configs of a transformer and its VAE say."""
    stride = vae_stride(vae)
    side, multiple = config["sample_size"] * stride, stride * config["patch_size"]
    return Shape(dit_layers(config, vae), side, multiple)


def load_transformer(kind: type[T], request: Request, config: Mapping[str, Any]) -> T:
    """The transformer with the blocks that are wanted, frozen.

    Args:
        kind: its class.
        request: what to load.
        config: its config.

    Raises:
        ValueError: the weights are missing, unreadable, or not exactly the model's.
    """
    from revelio.backbones.loading import frozen, use_eager_attention
    from revelio.backbones.weights import DIFFUSERS, diffusers_part, read_weights

    settings = request.settings
    weights = read_weights(request.source, "transformer", DIFFUSERS)
    transformer: Any = diffusers_part(kind, config, weights, settings.number_format)
    # The head after the last block stays: it is a thousandth of the work, and forward() calls it.
    transformer.transformer_blocks = transformer.transformer_blocks[: len(request.layers)]
    if settings.attention == "eager":
        use_eager_attention(transformer)
    return frozen(transformer, settings.place)
