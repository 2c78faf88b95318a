"""Stable Diffusion 3 and 3.5: transformers over text and image tokens together (Esser et al. 2024).

    pixels (b 3 1024 1024) -> z0 (b 16 128 128) -> z_t = (1 - sigma) z0 + sigma e
        -> image tokens (b 4096 1536) a block -> grid (b 1536 64 64)

A block gives text tokens and image tokens; a layer is its image tokens. The text is the states of two CLIPs
side by side, followed by T5's; a pipeline may do without T5 (``[null, null]`` in model_index.json), and then
zeros stand in its place, as in diffusers' pipeline. Some blocks of SD3.5 attend to the image tokens once more
(``dual_attention_layers``), which changes nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import Request, Shape, register_family
from revelio.backbones.diffusion.transformer import (
    TransformerBackbone,
    load_transformer,
    transformer_configs,
    transformer_shape,
)
from revelio.backbones.source import Source

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.text_encoder import TextEncoder
    from revelio.backbones.diffusion.vae import LatentSpace

CLIP = "CLIPTextModelWithProjection"
T5_LENGTH = 256  # tokens; the pipeline's `max_sequence_length`
NEEDED: dict[str, type] = {"joint_attention_dim": int, "pooled_projection_dim": int}


@register_family
class SD3Backbone(TransformerBackbone):
    """A joint transformer with its VAE and text encoders.

    Attributes:
        transformer: the transformer.
        latents: the VAE.
        clips: the two CLIP text encoders.
        t5: the T5 encoder, if the pipeline has one.
    """

    family = "sd3"
    kind = "MMDiT"
    title = "Stable Diffusion 3 and 3.5"
    parts = {  # noqa: RUF012
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": CLIP,
        "text_encoder_2": CLIP,
    }
    optional = {"text_encoder_3": "T5EncoderModel"}  # noqa: RUF012
    pipelines = ("StableDiffusion3Pipeline",)
    output_position = 1

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        latents: LatentSpace,
        clips: Sequence[TextEncoder],
        t5: TextEncoder | None,
        attention: str,
        **common: Any,
    ) -> None:
        super().__init__(transformer, latents, **common)
        self.clips = list(clips)
        self.t5 = t5
        self._attention = attention

    @classmethod
    def load(cls, request: Request) -> SD3Backbone:
        """Load transformer, VAE, text encoders and tokenizers."""
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
        from transformers import CLIPTextModelWithProjection

        from revelio.backbones.diffusion.t5 import load_t5
        from revelio.backbones.diffusion.text_encoder import load_text_encoder
        from revelio.backbones.diffusion.vae import load_latent_space

        source, settings = request.source, request.settings
        config, _ = _configs(source)
        common = request.flow()
        clips = [
            load_text_encoder(
                source,
                settings,
                suffix=suffix,
                kind=CLIPTextModelWithProjection,
                penultimate=True,
                pooled="text_embeds",
            )
            for suffix in ("", "_2")
        ]
        t5 = None
        if source.json("model_index.json").get("text_encoder_3") not in (None, [None, None]):
            t5 = load_t5(source, settings, suffix="_3", length=T5_LENGTH)
        _check_widths(source, config, clips, t5)
        latents = load_latent_space(source, settings, request.multiple)
        # Its attention joins text and image, which no step-by-step module of diffusers does: see `denoise`.
        fused = replace(request, settings=replace(settings, attention="sdpa"))
        transformer = load_transformer(SD3Transformer2DModel, fused, config)
        return cls(transformer, latents, clips, t5, settings.attention, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the configs of the transformer and the VAE."""
        return transformer_shape(*_configs(source))

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The text states and pooled texts of any texts, each encoded once."""
        import torch

        from revelio.backbones.diffusion.conditioning import Conditioning, distinct

        once, rows = distinct(prompts)
        clips = [clip.tables(once)[0] for clip in self.clips]
        states = torch.cat([clip["states"] for clip in clips], -1)
        width = self.transformer.config["joint_attention_dim"]
        states = torch.nn.functional.pad(states, (0, width - states.shape[-1]))
        t5 = self.t5.embed(once) if self.t5 else states.new_zeros(len(once), T5_LENGTH, width)
        inputs = {
            "encoder_hidden_states": torch.cat([states, t5], 1),
            "pooled_projections": torch.cat([clip["pooled"] for clip in clips], -1),
        }
        return Conditioning(rows, inputs)

    def denoise(self, x_t: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's prediction, noise minus latents."""
        from revelio.backbones.loading import attention_kernel

        with attention_kernel(self._attention):
            return super().denoise(x_t, times, conditioning)

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """A ``StableDiffusion3Pipeline``."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            StableDiffusion3Pipeline,
        )

        (clip, words), (clip_2, words_2) = (each.parts() for each in self.clips)
        t5, words_3 = (None, None) if self.t5 is None else self.t5.parts()
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=scheduler,
            vae=self.latents.vae,
            text_encoder=clip,
            tokenizer=words,
            text_encoder_2=clip_2,
            tokenizer_2=words_2,
            text_encoder_3=t5,  # type: ignore[arg-type]
            tokenizer_3=words_3,  # type: ignore[arg-type]
        )


def _configs(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the transformer and the VAE.

    Raises:
        ValueError: one is missing, of another class, says no size, or they don't fit.
    """
    return transformer_configs(source, SD3Backbone.parts["transformer"], **NEEDED)


def _check_widths(
    source: Source, config: dict[str, Any], clips: Sequence[TextEncoder], t5: TextEncoder | None
) -> None:
    """Raise a ValueError unless the text encoders fit the transformer."""
    from revelio.backbones.diffusion.text_encoder import check_width

    width = config["joint_attention_dim"]
    given = sum(clip.width for clip in clips) if t5 is None else t5.width
    # Beside a T5 the CLIPs' states are narrower and padded; without one, they may be as wide as it would be.
    if t5 is not None or given > width:
        check_width(source, given, width)
    pooled = sum(clip.parts()[0].config.projection_dim for clip in clips)
    check_width(source, pooled, config["pooled_projection_dim"])
