"""Tiny random pipelines of rectified flow, written as whole folders: see backbones_helpers.

tiny_sd3   32 px, latents 4x16x16, 3 blocks of 64 image tokens x 16, text 48 wide
tiny_flux  latents packed 2x2, 2 joint and 3 single blocks of width 16, text 24 wide
"""

from pathlib import Path
from typing import Any

from backbones_helpers import (
    seeded,
    tiny_projected_clip,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vae,
)
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from transformers import CLIPTextModel


def tiny_sd3(folder: Path, *, t5: bool = True, dual: tuple[int, ...] = ()) -> Path:
    """A ``StableDiffusion3Pipeline`` folder at 32 px."""
    sd3_pipeline(t5=t5, dual=dual).save_pretrained(folder)
    return folder


def sd3_pipeline(*, t5: bool = True, dual: tuple[int, ...] = ()) -> StableDiffusion3Pipeline:
    """The pipeline of :func:`tiny_sd3` in memory."""
    transformer = seeded(
        lambda: SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=24,
            dual_attention_layers=dual,
            qk_norm="rms_norm" if dual else None,
        ),
        1,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.25, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_projected_clip(16, seed=1),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_projected_clip(24, seed=2),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(48) if t5 else None,  # type: ignore[arg-type]
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,  # type: ignore[arg-type]
    )


def tiny_flux(folder: Path, *, dev: bool = True) -> Path:
    """A ``FluxPipeline`` folder; of dev's kind, or of schnell's without guidance and shift."""
    flux_pipeline(dev=dev).save_pretrained(folder)
    return folder


def flux_pipeline(*, dev: bool = True) -> FluxPipeline:
    """The pipeline of :func:`tiny_flux` in memory."""
    transformer = seeded(
        lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=dev,
            axes_dims_rope=(2, 2, 4),
        ),
        1,
    )
    shifting: Any = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
        vae=tiny_vae(shift_factor=0.25, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=seeded(lambda: CLIPTextModel(tiny_text_config(16)), 1),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(24),
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=transformer,
    )
