"""Tiny random pipelines of every family, in memory, and k-SAEs of their layers."""

from typing import Any

import torch
from backbones_helpers import (
    TEXT_LENGTH,
    _scheduler,
    seeded,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vae,
)
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from revelio.sae.model import KSparseAutoencoder

TEXT_LAYERS = {
    "sd": "text_encoder.block0",
    "sdxl": "text_encoder.block0+text_encoder_2.block1",
    "sd3": "text_encoder_3.block1",
    "flux": "text_encoder_2.block1",
}


def _t5(seed: int = 0) -> T5EncoderModel:
    tokenizer = tiny_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=24, d_kv=4, d_ff=16, num_layers=3, num_heads=2
    )
    return seeded(lambda: T5EncoderModel(config), seed)


def _clip(width: int = 16, *, projection: bool = False, seed: int = 0) -> Any:
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return seeded(lambda: kind(tiny_text_config(width)), seed)


def _unet(**more: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 12),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": [2, 3],
    }
    return seeded(lambda: UNet2DConditionModel(**settings | more), 0)


def _vae16() -> AutoencoderKL:
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            shift_factor=0.0,
        ),
        0,
    )


def sd(**more: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: one text encoder."""
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=_clip(),
        tokenizer=tiny_tokenizer(),
        unet=_unet(cross_attention_dim=16),
        scheduler=_scheduler("scaled_linear", "epsilon"),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL: two text encoders, the penultimate hidden states of both."""
    unet = _unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=_clip(),
        text_encoder_2=_clip(projection=True, seed=1),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=_scheduler("scaled_linear", "epsilon"),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: two CLIPs and a T5."""
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        0,
    )
    t5 = T5Config(
        vocab_size=len(tiny_tokenizer()), d_model=32, d_kv=4, d_ff=16, num_layers=3, num_heads=2
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae16(),
        text_encoder=_clip(projection=True),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_clip(projection=True, seed=1),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=seeded(lambda: T5EncoderModel(t5), 0),
        tokenizer_3=tiny_tokenizer(),  # type: ignore[arg-type]
    )


def flux() -> FluxPipeline:
    """Flux: a pooled CLIP and a T5."""
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
        0,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae16(),
        text_encoder=_clip(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=tiny_tokenizer(),  # type: ignore[arg-type]
        transformer=transformer,
    )


def dit() -> DiTPipeline:
    """A DiT of ten classes."""
    transformer = seeded(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        0,
    )
    return DiTPipeline(
        transformer=transformer, vae=tiny_vae(), scheduler=_scheduler("linear", "epsilon")
    )


PIPELINES = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def draw(pipeline: Any, prompt: Any = "a cat", **more: Any) -> torch.Tensor:
    """What a pipeline draws in two steps, as latents."""
    arguments: dict[str, Any] = {
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(0),
    }
    if isinstance(pipeline, FluxPipeline):
        arguments["max_sequence_length"] = TEXT_LENGTH
    if isinstance(pipeline, StableDiffusion3Pipeline):
        arguments["max_sequence_length"] = TEXT_LENGTH
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, **arguments | more).images


def ksae_of(width: int, *, n: int = 32, k: int = 4, seed: int = 0) -> KSparseAutoencoder:
    """A random k-SAE."""
    return KSparseAutoencoder(width, n, k, seed=seed).eval()
