"""Pixel-space DDPMs: an unconditional or class-conditional U-Net without a VAE (Ho et al. 2020).

    pixels x0 (b 3 256 256) -> x_t -> U-Net cut after the deepest wanted layer

The layers are named as Stable Diffusion's: ``bottleneck`` and ``up_ft0`` ... after each decoder block's
upsampler; the last has the pixels' own resolution. Folders of a ``DDPMPipeline`` or ``DDIMPipeline``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import DiffusionBackbone, Request, Shape, register_family
from revelio.backbones.layers import Layers, unet_layers, unet_multiple
from revelio.backbones.source import Source

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from jaxtyping import Float
    from torch import Tensor, nn

    from revelio.backbones.diffusion.conditioning import Conditioning

CHANNELS = 3
NEEDED: dict[str, type] = {"block_out_channels": list, "in_channels": int}


@register_family
class PixelDDPM(DiffusionBackbone):
    """A U-Net on pixels.

    Attributes:
        unet: the U-Net.
        classes: how many classes it is conditioned on; None for an unconditional model.
    """

    family = "ddpm"
    kind = "U-Net"
    title = "pixel-space DDPM"
    parts = {"unet": "UNet2DModel"}  # noqa: RUF012
    without = ("vae", "vqvae", "movq", "text_encoder")
    pipelines = ("DDPMPipeline", "DDIMPipeline")

    def __init__(self, unet: UNet2DModel, multiple: int, **common: Any) -> None:
        super().__init__(**common)
        self.unet = unet
        self.classes: int | None = unet.config["num_class_embeds"]
        self._multiple = multiple

    @classmethod
    def load(cls, request: Request) -> PixelDDPM:
        """Load the U-Net."""
        return cls(_load_unet(request), request.multiple, **request.common())

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the U-Net's config."""
        config = _config(source)
        side = config["sample_size"]
        side = side if isinstance(side, int) else min(side)
        return Shape(unet_layers(config, None), side, unet_multiple(config, None))

    @property
    def network(self) -> nn.Module:
        """The U-Net."""
        return self.unet

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The pixels, moved to the model's device: there is nothing to share between passes.

        Raises:
            ValueError: the pixels' sides don't fit.
        """
        height, width = pixels.shape[-2:]
        if height % self._multiple or width % self._multiple:
            raise ValueError(
                f"pixels of {height}x{width} don't fit {self.name}: "
                f"both sides must be multiples of {self._multiple}"
            )
        return pixels.to(self._device)

    def decode(self, z: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The pixels as they are."""
        return z.to(self._device)

    def layer_module(self, layer: str) -> nn.Module:
        """The U-Net's middle block or one of its decoder blocks."""
        if layer == "bottleneck":
            return self.unet.get_submodule("mid_block")
        return self.unet.up_blocks[int(layer.removeprefix("up_ft"))]

    def check(self, timestep: int | None, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a timestep or a prompt that the model does not take."""
        for prompt in prompts:
            self._class(prompt)
        super().check(timestep, prompts)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Class labels, of a class-conditional model; a prompt is a class id.

        Raises:
            ValueError: a prompt that is no class of the model, or any for an unconditional one.
        """
        import torch

        from revelio.backbones.diffusion.conditioning import Conditioning, distinct

        once, rows = distinct(prompts)
        labels = [self._class(prompt) for prompt in once]
        if self.classes is None:
            return Conditioning(rows)
        return Conditioning(rows, {"class_labels": torch.tensor(labels, device=self._device)})

    def denoise(self, x_t: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction; a learned variance, the channels behind it, is left out."""
        import torch

        if x_t.device.type == "cpu":
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        output = self.unet(x_t, times, **conditioning.arguments()).sample
        return output[:, :CHANNELS]

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """A ``DDPMPipeline``.

        Raises:
            ValueError: the model is class-conditional, for which diffusers has no pipeline.
        """
        from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

        if self.classes is not None:
            raise ValueError(
                f"diffusers has no pipeline for {self.name}, which is class-conditional"
            )
        return DDPMPipeline(unet=self.unet, scheduler=scheduler)

    def _class(self, prompt: str) -> int:
        if self.classes is None:
            if prompt:
                raise ValueError(f"{self.name} takes no prompts: use the prompt policy `empty`")
            return 0
        if not (prompt.isdecimal() and int(prompt) < self.classes):
            raise ValueError(
                f"{self.name} is conditioned on classes, not on text like {prompt!r}, and has no class "
                f"that stands for none: give a class id from 0 to {self.classes - 1}"
            )
        return int(prompt)


def _config(source: Source) -> dict[str, Any]:
    """The config of the U-Net.

    Raises:
        ValueError: it is missing, says no size, or is of a model on other inputs than RGB pixels.
    """
    config = source.part_config("unet", "UNet2DModel", NEEDED, refused=("class_embed_type",))
    source.check_sides("unet/config.json", config)
    if config.get("num_class_embeds") is not None:
        source.check("unet/config.json", config, {"num_class_embeds": int})
    if config["in_channels"] != CHANNELS:
        raise ValueError(
            f"{source.name} takes {config['in_channels']} input channels: a pixel-space DDPM takes {CHANNELS}"
        )
    if "Skip" in f"{config.get('down_block_types')}{config.get('up_block_types')}":
        raise ValueError(f"{source.name} has skip blocks (NCSN++), which are not supported")
    return config


def _load_unet(request: Request) -> UNet2DModel:
    from diffusers.models.unets.unet_2d import UNet2DModel

    from revelio.backbones.loading import frozen, use_eager_attention
    from revelio.backbones.weights import DIFFUSERS, diffusers_part, read_weights

    settings, config = request.settings, _config(request.source)
    weights = read_weights(request.source, "unet", DIFFUSERS)
    unet = diffusers_part(UNet2DModel, config, weights, settings.number_format)
    if not request.whole:
        _cut(unet, request.layers)
    if settings.attention == "eager":
        use_eager_attention(unet)
    return frozen(unet, settings.place, convolutional=True)


def _cut(unet: UNet2DModel, layers: Layers) -> None:
    """Drop everything that comes after the last of ``layers``."""
    from torch import nn

    depth = sum(layer.startswith("up_ft") for layer in layers)
    unet.up_blocks = unet.up_blocks[:depth]
    unet.conv_norm_out = unet.conv_out = nn.Identity()  # type: ignore[assignment]
