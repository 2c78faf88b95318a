"""What the families with a U-Net share: loading, cutting, and where the layers' outputs appear.

The layers are ``bottleneck``, the middle block, and ``up_ft0`` ..., each decoder block after its upsampler.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from revelio.backbones.diffusion.base import DiffusionBackbone, Request, Shape
from revelio.backbones.layers import Layers, unet_layers, unet_multiple, vae_stride
from revelio.backbones.source import MORE_INPUTS, Source
from revelio.wording import plural

if TYPE_CHECKING:
    from torch import Tensor, nn

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.vae import PixelSpace
    from revelio.backbones.weights import Weights

# What the original releases put before the names of the U-Net's weights.
ORIGINAL = "model.diffusion_model."
NEEDED: dict[str, type] = {"block_out_channels": list, "in_channels": int}

U = TypeVar("U", bound="nn.Module")


class UNetBackbone(DiffusionBackbone):
    """A U-Net, whatever it is conditioned on.

    Attributes:
        unet: the U-Net.
    """

    kind = "U-Net"

    def __init__(self, unet: Any, **common: Any) -> None:
        super().__init__(**common)
        self.unet = unet

    @property
    def network(self) -> nn.Module:
        """The U-Net."""
        return self.unet

    def layer_module(self, layer: str) -> nn.Module:
        """The U-Net's middle block or one of its decoder blocks."""
        return layer_module(self.unet, layer)

    def inputs(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The U-Net's arguments beside image and timestep."""
        return conditioning.arguments()

    def denoise(self, x_t: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction; a learned variance, the channels behind it, is left out."""
        import torch

        if x_t.device.type == "cpu":
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        output = self.unet(x_t, times, **self.inputs(x_t, conditioning)).sample
        return output[:, : x_t.shape[1]]


class PixelUNetBackbone(UNetBackbone):
    """A U-Net on pixels, without a VAE.

    Attributes:
        unet: the U-Net.
        latents: the pixels as they are.
    """

    latents: PixelSpace

    def __init__(self, unet: Any, multiple: int, **common: Any) -> None:
        from revelio.backbones.diffusion.vae import PixelSpace

        super().__init__(unet, **common)
        self.latents = PixelSpace(self.name, multiple, self._device)


def unet_config(
    source: Source, kind: str = "UNet2DConditionModel", refused: Collection[str] = MORE_INPUTS
) -> dict[str, Any]:
    """The config of the U-Net.

    Raises:
        ValueError: it is missing, of another class, says no size, or sets one of ``refused``.
    """
    config = source.part_config("unet", kind, NEEDED, refused)
    source.check_sides("unet/config.json", config)
    return config


def latent_config(source: Source, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the VAE in front of a U-Net.

    Raises:
        ValueError: it is missing, or its latents are not what the U-Net takes.
    """
    vae = source.vae_config()
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"{source.name} takes {plural(unet['in_channels'], 'input channel')} (for inpainting or "
            "depth): only text-to-image models are supported"
        )
    return vae


def unet_shape(unet: Mapping[str, Any], vae: Mapping[str, Any] | None) -> Shape:
    """What the configs of a U-Net and of the VAE in front of it, if any, say."""
    side = unet["sample_size"]
    side = side if isinstance(side, int) else min(side)
    pixels = 1 if vae is None else vae_stride(vae)
    return Shape(unet_layers(unet, vae), side * pixels, unet_multiple(unet, vae))


def layer_module(unet: Any, layer: str) -> nn.Module:
    """The module whose output is ``layer``: ``mid_block`` or one of ``up_blocks``."""
    if layer == "bottleneck":
        return unet.get_submodule("mid_block")
    return unet.up_blocks[int(layer.removeprefix("up_ft"))]


def cut(unet: Any, layers: Layers) -> None:
    """Drop everything that comes after the last of ``layers``; its memory is freed."""
    from torch import nn

    depth = sum(layer.startswith("up_ft") for layer in layers)
    unet.up_blocks = unet.up_blocks[:depth]
    unet.conv_norm_out = unet.conv_out = nn.Identity()


def load_unet(kind: type[U], request: Request, config: Mapping[str, Any]) -> U:
    """The U-Net, cut unless all is wanted, frozen.

    Args:
        kind: its class.
        request: what to load.
        config: its config.

    Raises:
        ValueError: the weights are missing, unreadable, or not exactly the model's.
    """
    from revelio.backbones.loading import frozen, use_eager_attention
    from revelio.backbones.weights import diffusers_part

    settings = request.settings
    weights = _unet_weights(request.source, config)
    unet = diffusers_part(kind, config, weights, settings.number_format)
    if not request.whole:
        cut(unet, request.layers)
    if settings.attention == "eager":
        use_eager_attention(unet)
    return frozen(unet, settings.place, convolutional=True)


def _unet_weights(source: Source, config: Mapping[str, Any]) -> Weights:
    """The U-Net's weights; out of a single file also by the names of the original releases."""
    from revelio.backbones.loading import reading
    from revelio.backbones.weights import DIFFUSERS, read_weights

    weights = read_weights(source, "unet", DIFFUSERS)
    original = {k: v for k, v in weights.tensors.items() if k.startswith(ORIGINAL)}
    if not original:
        return weights
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with reading(f"the U-Net in {weights.where} (with the config of {source.location})"):
        return replace(weights, tensors=convert_ldm_unet_checkpoint(original, dict(config)))
