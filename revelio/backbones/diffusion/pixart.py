"""PixArt-alpha and -sigma: text-conditional diffusion transformers, one layer a block (Chen et al. 2023).

    pixels (b 3 512 512) -> z0 (b 4 64 64) -> z_t -> tokens (b 1024 1152) a block -> grid (b 1152 32 32)

Blocks attend to T5's states of the prompt in lower case; padding is hidden. The transformer predicts the
noise and its variance: the noise is the first half of the channels. Alpha at 1024 px is also told the size
of the picture and its aspect ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import Request, Shape, register_family
from revelio.backbones.diffusion.transformer import (
    TransformerBackbone,
    load_transformer,
    transformer_configs,
    transformer_shape,
)
from revelio.backbones.layers import vae_stride
from revelio.backbones.source import Source

if TYPE_CHECKING:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.text_encoder import TextEncoder
    from revelio.backbones.diffusion.vae import LatentSpace

# The text lengths that they were trained with, in tokens, by their pipelines.
ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
TOKENS = {ALPHA: 120, SIGMA: 300}


@register_family
class PixArtBackbone(TransformerBackbone):
    """A diffusion transformer with its VAE and text encoder.

    Attributes:
        transformer: the transformer.
        latents: the VAE.
        text: the text encoder.
    """

    family = "pixart"
    title = "PixArt"
    # The folders of the release name the class that it had in older versions of diffusers.
    parts = {  # noqa: RUF012
        "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),
        "vae": "AutoencoderKL",
        "text_encoder": "T5EncoderModel",
    }
    pipelines = (ALPHA, SIGMA)

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        latents: LatentSpace,
        text: TextEncoder,
        sigma: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(transformer, latents, **common)
        self.text = text
        self._sigma = sigma
        self._stride = vae_stride(latents.vae.config)

    @classmethod
    def load(cls, request: Request) -> PixArtBackbone:
        """Load transformer, VAE, text encoder and tokenizer."""
        from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

        from revelio.backbones.diffusion.t5 import load_t5, lowercased
        from revelio.backbones.diffusion.text_encoder import check_width
        from revelio.backbones.diffusion.vae import load_latent_space

        source, settings, common = request.source, request.settings, request.common()
        config, _ = _configs(source)
        sigma = source.json("model_index.json").get("_class_name") == SIGMA
        length = TOKENS[SIGMA if sigma else ALPHA]
        text = load_t5(source, settings, length=length, masked=True, prepare=lowercased)
        check_width(source, text.width, config["caption_channels"])
        latents = load_latent_space(source, settings, request.multiple)
        transformer = load_transformer(PixArtTransformer2DModel, request, config)
        return cls(transformer, latents, text, sigma, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the configs of the transformer and the VAE."""
        return transformer_shape(*_configs(source))

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The text states of any texts, each encoded once, and which of them are padding."""
        from revelio.backbones.diffusion.conditioning import Conditioning

        told, rows = self.text.tables(prompts)
        return Conditioning(
            rows, {"encoder_hidden_states": told["states"], "encoder_attention_mask": told["mask"]}
        )

    def inputs(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Text states and mask; of a model that takes them, the picture's sides and aspect ratio."""
        import torch

        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            height, width = (side * self._stride for side in x_t.shape[-2:])
            for name, told in (("resolution", [height, width]), ("aspect_ratio", [height / width])):
                sizes = torch.tensor(told, dtype=x_t.dtype).to(x_t.device, non_blocking=True)
                added[name] = sizes.expand(len(x_t), len(told))
        return {**conditioning.arguments(), "added_cond_kwargs": added}

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """A ``PixArtAlphaPipeline`` or ``PixArtSigmaPipeline``."""
        from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
        from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline

        model, tokenizer = self.text.parts()
        kind: Any = PixArtSigmaPipeline if self._sigma else PixArtAlphaPipeline
        return kind(
            tokenizer=tokenizer,
            text_encoder=model,
            vae=self.latents.vae,
            transformer=self.transformer,
            scheduler=scheduler,
        )


def _configs(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the transformer and the VAE.

    Raises:
        ValueError: one is missing, of another class, says no size, or they don't fit.
    """
    kinds = PixArtBackbone.parts["transformer"]
    config, vae = transformer_configs(source, kinds, caption_channels=int)
    if config.get("norm_type") != "ada_norm_single":
        raise ValueError(
            f"transformer/config.json of {source.name} has norm_type {config.get('norm_type')!r}: PixArt has "
            "ada_norm_single"
        )
    return config, vae
