"""Tiny random pipelines of every family, in memory, and k-SAEs of their layers."""

from functools import partial
from typing import Any

import torch
from backbones_helpers import (
    TEXT_LENGTH,
    _scheduler,
    dit_pipeline,
    sdxl_pipeline,
    seeded,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vae,
)
from diffusers import (
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from flow_helpers import flux_pipeline, sd3_pipeline
from transformers import CLIPTextModel

from revelio.sae.model import KSparseAutoencoder

TEXT_LAYERS = {
    "sd": "text_encoder.block0",
    "sdxl": "text_encoder.block0+text_encoder_2.block1",
    "sd3": "text_encoder_3.block0",
    "flux": "text_encoder_2.block0",
}


def sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: one text encoder, a U-Net of two levels."""
    unet = seeded(
        lambda: UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 12),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=[2, 3],
            cross_attention_dim=16,
        ),
        0,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=seeded(lambda: CLIPTextModel(tiny_text_config()), 0),
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=_scheduler("scaled_linear", "epsilon"),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


# The empty prompt is encoded like any other.
sdxl = partial(sdxl_pipeline, force_zeros_for_empty_prompt=False)
flux = partial(flux_pipeline, dev=False)
# diffusers takes 1000 for the null class.
dit = partial(dit_pipeline, 1000)
PIPELINES = {"sd": sd, "sdxl": sdxl, "sd3": sd3_pipeline, "flux": flux}


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
    if isinstance(pipeline, FluxPipeline | StableDiffusion3Pipeline):
        arguments["max_sequence_length"] = TEXT_LENGTH
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, **arguments | more).images


def ksae_of(width: int, *, n: int = 32, k: int = 4, seed: int = 0) -> KSparseAutoencoder:
    """A random k-SAE."""
    return KSparseAutoencoder(width, n, k, seed=seed).eval()
