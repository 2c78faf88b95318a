"""Stable Diffusion 1.x and 2.x: the U-Net's middle and decoder blocks (SPEC 1.1, 2.2).

    pixels (b 3 512 512) -> z0 (b 4 64 64) -> z_t -> U-Net cut after the deepest wanted layer

Any folder or hub id whose model_index.json lists such parts takes this path, whatever its pipeline is
called. Whether the model predicts noise or velocity (SD-2.1 at 768 px) makes no difference to activations,
which need the noised input only; predictions are told apart by the schedule.
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
from revelio.backbones.source import Source

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.text_encoder import TextEncoder
    from revelio.backbones.diffusion.vae import LatentSpace


@register_family
class StableDiffusionBackbone(UNetBackbone):
    """A U-Net with its VAE and text encoder.

    Attributes:
        unet: the U-Net.
        latents: the VAE.
        text: the text encoder.
    """

    family = "stable-diffusion"
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
        super().__init__(unet, **common)
        self.latents = latents
        self.text = text

    @classmethod
    def load(cls, request: Request) -> StableDiffusionBackbone:
        """Load U-Net, VAE, text encoder and tokenizer; nothing else of the pipeline."""
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        from revelio.backbones.diffusion.text_encoder import check_width, load_text_encoder
        from revelio.backbones.diffusion.vae import load_latent_space

        source, settings = request.source, request.settings
        config = unet_config(source)
        latent_config(source, config)
        latents, common = load_latent_space(source, settings, request.multiple), request.common()
        unet = load_unet(UNet2DConditionModel, request, config)
        text = load_text_encoder(source, settings)
        check_width(source, text.width, unet.config["cross_attention_dim"])
        return cls(unet, latents, text, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the configs of the U-Net and the VAE."""
        return unet_shape(unet_config(source), source.vae_config())

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The text states of any texts, each encoded once."""
        from revelio.backbones.diffusion.conditioning import Conditioning

        told, rows = self.text.tables(prompts)
        return Conditioning(rows, {"encoder_hidden_states": told["states"]})

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
