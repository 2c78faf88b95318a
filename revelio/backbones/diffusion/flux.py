"""Flux: a transformer of joint and single blocks on packed latents (Black Forest Labs 2024).

    pixels (b 3 1024 1024) -> z0 (b 16 128 128) -> z_t = (1 - sigma) z0 + sigma e
        -> packed 2 x 2: tokens (b 4096 64) -> image tokens (b 4096 3072) a block -> grid (b 3072 64 64)

The joint blocks, ``double0`` ..., have weights of their own for text and image; the ``single`` blocks behind
them share theirs. Both give text tokens and image tokens; a layer is its image tokens. T5's states are the
text; of the CLIP only the pooled vector is used. FLUX.1-dev was distilled to take a guidance scale as input
(``guidance_embeds``); FLUX.1-schnell takes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import Request, Shape, register_family
from revelio.backbones.diffusion.transformer import TransformerBackbone
from revelio.backbones.layers import flux_layers, vae_stride
from revelio.backbones.source import Source
from revelio.wording import plural

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from torch import Tensor, nn

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.text_encoder import TextEncoder
    from revelio.backbones.diffusion.vae import LatentSpace

PATCH = 2  # latent cells that are packed into one token along a side
LATENT_SIDE = 128  # the pipeline's `default_sample_size`; no config says it
T5_LENGTH = 512  # tokens; the pipeline's `max_sequence_length`
GUIDANCE = 3.5  # the pipeline's `guidance_scale`
TIMES = 1000  # the transformer multiplies its timestep by this
NEEDED: dict[str, type] = dict.fromkeys(
    (
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "num_single_layers",
        "in_channels",
        "joint_attention_dim",
        "pooled_projection_dim",
    ),
    int,
)


@register_family
class FluxBackbone(TransformerBackbone):
    """A Flux transformer with its VAE and text encoders.

    Attributes:
        transformer: the transformer.
        latents: the VAE.
        clip: the CLIP text encoder, for the pooled text.
        t5: the T5 encoder.
        guidance: the guidance scale that a guidance-distilled transformer is told; others are told none.
    """

    family = "flux"
    kind = "MMDiT"
    title = "Flux"
    parts = {  # noqa: RUF012
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    pipelines = ("FluxPipeline",)
    output_position = 1

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        latents: LatentSpace,
        clip: TextEncoder,
        t5: TextEncoder,
        attention: str,
        **common: Any,
    ) -> None:
        super().__init__(transformer, latents, **common)
        self.clip = clip
        self.t5 = t5
        self.guidance = GUIDANCE
        self._attention = attention

    @classmethod
    def load(cls, request: Request) -> FluxBackbone:
        """Load transformer, VAE, text encoders and tokenizers."""
        from revelio.backbones.diffusion.t5 import load_t5
        from revelio.backbones.diffusion.text_encoder import check_width, load_text_encoder
        from revelio.backbones.diffusion.vae import load_latent_space

        source, settings = request.source, request.settings
        config, _ = _configs(source)
        common = request.flow()
        clip = load_text_encoder(source, settings, pooled="pooler_output")
        t5 = load_t5(source, settings, suffix="_2", length=T5_LENGTH)
        check_width(source, clip.width, config["pooled_projection_dim"])
        check_width(source, t5.width, config["joint_attention_dim"])
        latents = load_latent_space(source, settings, request.multiple)
        transformer = _load_transformer(request, config)
        return cls(transformer, latents, clip, t5, settings.attention, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the configs of the transformer and the VAE."""
        config, vae = _configs(source)
        stride = vae_stride(vae)
        return Shape(flux_layers(config, stride * PATCH), LATENT_SIDE * stride, stride * PATCH)

    def layer_module(self, layer: str) -> nn.Module:
        """One of the transformer's joint or single blocks."""
        if layer.startswith("double"):
            return self.transformer.transformer_blocks[int(layer.removeprefix("double"))]
        return self.transformer.single_transformer_blocks[int(layer.removeprefix("single"))]

    def as_grid(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Image tokens on the grid of the packed latents."""
        from revelio.backbones.hooks import tokens_to_grid

        height, width = (side // PATCH for side in x_t.shape[-2:])
        return tokens_to_grid(output, height, width)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """T5's states and the CLIP's pooled vector of any texts, each encoded once."""
        from revelio.backbones.diffusion.conditioning import Conditioning

        clip, rows = self.clip.tables(prompts)
        t5, _ = self.t5.tables(prompts)
        inputs = {"encoder_hidden_states": t5["states"], "pooled_projections": clip["pooled"]}
        return Conditioning(rows, inputs)

    def denoise(self, x_t: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's prediction, noise minus latents."""
        import torch
        from torch.nn.functional import pixel_shuffle, pixel_unshuffle

        from revelio.backbones.loading import attention_kernel

        text = conditioning.arguments()
        # (b c h w) -> tokens (b h/2*w/2 4c): of a token's channels, the latent's c vary slowest.
        packed = pixel_unshuffle(x_t, PATCH)
        height, width = packed.shape[-2:]
        guidance = None
        if self.transformer.config["guidance_embeds"]:
            guidance = torch.full((len(x_t),), self.guidance, device=x_t.device)
        with attention_kernel(self._attention):
            tokens = self.transformer(
                packed.flatten(2).transpose(1, 2),
                timestep=times.to(x_t.dtype) / TIMES,
                guidance=guidance,
                img_ids=_image_ids(height, width).to(x_t, non_blocking=True),
                txt_ids=x_t.new_zeros(text["encoder_hidden_states"].shape[1], 3),
                **text,
            ).sample
        return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), PATCH)

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """A ``FluxPipeline``."""
        from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

        clip, words = self.clip.parts()
        t5, words_2 = self.t5.parts()
        return FluxPipeline(
            scheduler=scheduler,
            vae=self.latents.vae,
            text_encoder=clip,
            tokenizer=words,
            text_encoder_2=t5,
            tokenizer_2=words_2,
            transformer=self.transformer,
        )


def _configs(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the transformer and the VAE.

    Raises:
        ValueError: one is missing, of another class, says no size, or they don't fit.
    """
    kind = FluxBackbone.parts["transformer"]
    config, vae = source.part_config("transformer", kind, NEEDED), source.vae_config()
    if config["in_channels"] != vae["latent_channels"] * PATCH**2:
        raise ValueError(
            f"the transformer of {source.name} takes {plural(config['in_channels'], 'channel')}, its VAE "
            f"gives {vae['latent_channels']}, which are packed to {vae['latent_channels'] * PATCH**2} "
            "(models for filling in, depth or edges take more): only text-to-image models are supported"
        )
    return config, vae


def _load_transformer(request: Request, config: dict[str, Any]) -> FluxTransformer2DModel:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    from revelio.backbones.loading import frozen
    from revelio.backbones.weights import DIFFUSERS, diffusers_part, read_weights

    settings = request.settings
    weights = read_weights(request.source, "transformer", DIFFUSERS)
    transformer = diffusers_part(FluxTransformer2DModel, config, weights, settings.number_format)
    # As in DiT, the head behind the last block stays.
    double = sum(layer.startswith("double") for layer in request.layers)
    single = len(request.layers) - double
    transformer.transformer_blocks = transformer.transformer_blocks[:double]
    transformer.single_transformer_blocks = transformer.single_transformer_blocks[:single]
    return frozen(transformer, settings.place)


def _image_ids(height: int, width: int) -> Tensor:
    """Where each token stands: (0, row, column), in row-major order."""
    import torch

    zero = torch.zeros(1)
    return torch.cartesian_prod(zero, torch.arange(height) * 1.0, torch.arange(width) * 1.0)
