"""Stable Diffusion XL and SDXL-Turbo: the U-Net's middle and decoder blocks (Podell et al. 2023).

    pixels (b 3 1024 1024) -> z0 (b 4 128 128) -> z_t -> U-Net cut after the deepest wanted layer

Both text encoders give the output of their last block but one, joined along the channels; the second one's
projected text, and six numbers of the picture's size and crop, go in with the timestep. The empty prompt is
a text like any other: only a pipeline's *negative* prompt is zeroed (``force_zeros_for_empty_prompt``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import Request, Shape, register_family
from revelio.backbones.diffusion.unet import (
    UNetBackbone,
    latent_config,
    load_unet,
    unet_config,
    unet_shape,
)
from revelio.backbones.layers import vae_stride
from revelio.backbones.source import Source

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.text_encoder import TextEncoder
    from revelio.backbones.diffusion.vae import LatentSpace

# Inputs of other models that are built of the same U-Net.
REFUSED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
SIZES = (
    6  # height and width of the original, top and left of the crop, height and width of the target
)


@register_family
class SDXLBackbone(UNetBackbone):
    """A U-Net with its VAE and two text encoders.

    Attributes:
        unet: the U-Net.
        latents: the VAE.
        texts: the two text encoders.
    """

    family = "sdxl"
    title = "Stable Diffusion XL"
    parts = {  # noqa: RUF012
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    pipelines = ("StableDiffusionXLPipeline",)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        latents: LatentSpace,
        texts: tuple[TextEncoder, TextEncoder],
        zero_negative: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(unet, **common)
        self.latents = latents
        self.texts = texts
        self._zero_negative = zero_negative
        self._stride = vae_stride(latents.vae.config)

    @classmethod
    def load(cls, request: Request) -> SDXLBackbone:
        """Load U-Net, VAE, both text encoders and their tokenizers."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        from revelio.backbones.diffusion.vae import load_latent_space

        source, settings = request.source, request.settings
        config = _config(source)
        latent_config(source, config)
        latents, common = load_latent_space(source, settings, request.multiple), request.common()
        unet = load_unet(UNet2DConditionModel, request, config)
        texts = _load_texts(request, unet)
        index = source.json("model_index.json")
        zero_negative = bool(index.get("force_zeros_for_empty_prompt", True))
        return cls(unet, latents, texts, zero_negative, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the configs of the U-Net and the VAE."""
        return unet_shape(_config(source), source.vae_config())

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The joined text states and the pooled text of any texts, each encoded once."""
        import torch

        from revelio.backbones.diffusion.conditioning import Conditioning

        (first, rows), (second, _) = (text.tables(prompts) for text in self.texts)
        states = torch.cat([first["states"], second["states"]], dim=-1)
        return Conditioning(
            rows, {"encoder_hidden_states": states, "text_embeds": second["pooled"]}
        )

    def inputs(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Text states, pooled text, and the sizes of a picture that was neither scaled nor cropped."""
        import torch

        told = conditioning.arguments()
        height, width = (side * self._stride for side in x_t.shape[-2:])
        told_sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x_t.dtype)
        sizes = told_sizes.to(x_t.device, non_blocking=True).expand(len(x_t), SIZES)
        added = {"text_embeds": told.pop("text_embeds"), "time_ids": sizes}
        return {**told, "added_cond_kwargs": added}

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """A ``StableDiffusionXLPipeline`` without the watermark."""
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
            StableDiffusionXLPipeline,
        )

        (model, tokenizer), (model_2, tokenizer_2) = (text.parts() for text in self.texts)
        return StableDiffusionXLPipeline(
            vae=self.latents.vae,
            text_encoder=model,
            text_encoder_2=model_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=self.unet,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self._zero_negative,
            add_watermarker=False,
        )


def _config(source: Source) -> dict[str, Any]:
    """The config of the U-Net.

    Raises:
        ValueError: it is missing, or of a U-Net with other inputs.
    """
    config = unet_config(source, refused=REFUSED)
    needed: dict[str, type] = {
        "addition_time_embed_dim": int,
        "projection_class_embeddings_input_dim": int,
    }
    source.check("unet/config.json", config, needed)
    if config.get("addition_embed_type") != "text_time":
        raise ValueError(
            f"unet/config.json of {source.name} has addition_embed_type "
            f"{config.get('addition_embed_type')!r}: a Stable Diffusion XL U-Net has text_time"
        )
    return config


def _load_texts(request: Request, unet: UNet2DConditionModel) -> tuple[TextEncoder, TextEncoder]:
    """Both text encoders.

    Raises:
        ValueError: a part is missing, or they do not fit the U-Net.
    """
    from transformers import CLIPTextModelWithProjection

    from revelio.backbones.diffusion.text_encoder import check_width, load_text_encoder

    source, settings = request.source, request.settings
    first = load_text_encoder(source, settings, penultimate=True)
    second = load_text_encoder(
        source,
        settings,
        suffix="_2",
        kind=CLIPTextModelWithProjection,
        penultimate=True,
        pooled="text_embeds",
    )
    check_width(source, first.width + second.width, unet.config["cross_attention_dim"])
    pooled = second.parts()[0].config.projection_dim
    sizes = SIZES * unet.config["addition_time_embed_dim"]
    check_width(source, pooled, unet.config["projection_class_embeddings_input_dim"] - sizes)
    return first, second
