"""Stable Diffusion 1.x and 2.x: the U-Net's middle and decoder blocks (SPEC 1.1, 2.2).

    pixels (b 3 512 512) -> z0 (b 4 64 64) -> z_t -> U-Net cut after the deepest wanted layer

Any folder or hub id whose model_index.json lists such parts takes this path, whatever its pipeline is
called. Whether the model predicts noise or velocity (SD-2.1 at 768 px) makes no difference to activations,
which need the noised input only; predictions are told apart by the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import DiffusionBackbone, Request, Shape, register_family
from revelio.backbones.layers import Layers, unet_layers, unet_multiple, vae_stride
from revelio.backbones.source import Source

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor, nn

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.text_encoder import TextEncoder
    from revelio.backbones.diffusion.vae import LatentSpace
    from revelio.backbones.loading import LoadSettings
    from revelio.backbones.weights import Weights

# What the original releases put before the names of the U-Net's weights.
ORIGINAL = "model.diffusion_model."
NEEDED = {"block_out_channels": list, "in_channels": int}


@register_family
class StableDiffusionBackbone(DiffusionBackbone):
    """A U-Net with its VAE and text encoder.

    Attributes:
        unet: the U-Net.
        latents: the VAE.
        text: the text encoder.
    """

    family = "stable-diffusion"
    kind = "U-Net"
    title = "Stable Diffusion (1.x and 2.x)"
    parts = {  # noqa: RUF012
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    pipelines = ("StableDiffusionPipeline",)

    def __init__(
        self, unet: UNet2DConditionModel, latents: LatentSpace, text: TextEncoder, **common: Any
    ) -> None:
        super().__init__(**common)
        self.unet = unet
        self.latents = latents
        self.text = text

    @classmethod
    def load(cls, request: Request) -> StableDiffusionBackbone:
        """Load U-Net, VAE, text encoder and tokenizer; nothing else of the pipeline."""
        from revelio.backbones.diffusion.text_encoder import load_text_encoder
        from revelio.backbones.diffusion.vae import load_latent_space

        source, settings = request.source, request.settings
        config, vae = _configs(source)
        if config["in_channels"] != vae["latent_channels"]:
            raise ValueError(
                f"{source.name} takes {config['in_channels']} input channels (for inpainting or "
                "depth): only text-to-image models are supported"
            )
        latents, common = load_latent_space(source, settings, request.multiple), request.common()
        unet = _load_unet(request, config)
        text = load_text_encoder(source, settings, unet.config["cross_attention_dim"])
        return cls(unet, latents, text, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the configs of the U-Net and the VAE."""
        unet, vae = _configs(source)
        side = unet["sample_size"]
        side = side if isinstance(side, int) else min(side)
        return Shape(unet_layers(unet, vae), side * vae_stride(vae), unet_multiple(unet, vae))

    @property
    def network(self) -> nn.Module:
        """The U-Net."""
        return self.unet

    def layer_module(self, layer: str) -> nn.Module:
        """The U-Net's middle block or one of its decoder blocks."""
        return layer_module(self.unet, layer)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The text states of any texts, each encoded once."""
        from revelio.backbones.diffusion.conditioning import Conditioning

        states, rows = self.text.distinct(prompts)
        return Conditioning(rows, {"encoder_hidden_states": states})

    def denoise(self, x_t: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's prediction, noise or velocity."""
        import torch

        if x_t.device.type == "cpu":
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        return self.unet(x_t, times, **conditioning.arguments()).sample

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """A ``StableDiffusionPipeline`` without the safety checker."""
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
            StableDiffusionPipeline,
        )

        model, tokenizer = self.text.parts()
        return StableDiffusionPipeline(
            vae=self.latents.vae,
            text_encoder=model,
            tokenizer=tokenizer,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )


def _configs(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the U-Net and the VAE.

    Raises:
        ValueError: one is missing, of another class, or says no size.
    """
    unet = source.part_config("unet", "UNet2DConditionModel", NEEDED)
    source.check_sides("unet/config.json", unet)
    return unet, source.vae_config()


def layer_module(unet: UNet2DConditionModel, layer: str) -> nn.Module:
    """The module whose output is ``layer``: ``mid_block`` or one of ``up_blocks``."""
    if layer == "bottleneck":
        return unet.get_submodule("mid_block")
    return unet.up_blocks[int(layer.removeprefix("up_ft"))]


def cut(unet: UNet2DConditionModel, layers: Layers) -> None:
    """Drop everything that comes after the last of ``layers``; its memory is freed."""
    from torch import nn

    depth = sum(layer.startswith("up_ft") for layer in layers)
    unet.up_blocks = unet.up_blocks[:depth]
    unet.conv_norm_out = None
    unet.conv_out = nn.Identity()  # type: ignore[assignment]


def _load_unet(request: Request, config: Mapping[str, Any]) -> UNet2DConditionModel:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from revelio.backbones.loading import frozen, use_eager_attention
    from revelio.backbones.weights import diffusers_part

    settings: LoadSettings = request.settings
    weights = _unet_weights(request.source, config)
    unet = diffusers_part(UNet2DConditionModel, config, weights, settings.number_format)
    if not request.whole:
        cut(unet, request.layers)
    if settings.attention == "eager":
        use_eager_attention(unet)
    return frozen(unet, settings.place, convolutional=True)


def _unet_weights(source: Source, config: Mapping[str, Any]) -> Weights:
    """The U-Net's weights; out of a single file also by the names of the original releases."""
    from revelio.backbones.loading import reading
    from revelio.backbones.weights import DIFFUSERS, read_file, read_weights

    file = source.unet
    if file is None or file.is_dir():
        return read_weights(source, "unet", DIFFUSERS)
    weights = read_file(file)
    original = {k: v for k, v in weights.tensors.items() if k.startswith(ORIGINAL)}
    if not original:
        return weights
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with reading(f"the U-Net in {weights.where} (with the config of {source.location})"):
        return replace(weights, tensors=convert_ldm_unet_checkpoint(original, dict(config)))
