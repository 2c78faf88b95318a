"""Shipped folders back into what the Diffusion Classifier and the sampler need, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from tools.mini.denoisers import TextDenoiser, text_states
from tools.mini.latents import load_vae


def text_model(folder: Path, prompts: list[str]) -> tuple[TextDenoiser, AutoencoderKL]:
    """The U-Net of a Stable Diffusion folder with one prompt a class, and its VAE."""
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    table = text_states(encoder, tokenizer, [*prompts, ""])
    rows = list(range(len(prompts)))
    unet = unet.to(memory_format=torch.channels_last)  # pyright: ignore
    return TextDenoiser(unet, table, [[row] for row in rows], rows), load_vae(folder / "vae")


def sample(
    folder: Path, prompts: list[str], *, guidance: float, steps: int, seed: int
) -> list[Image.Image]:
    """Pictures by the standard pipeline, one a prompt; the empty prompt is the negative one."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None
    )
    return _in_parts(pipeline, prompts, guidance, steps, seed)


def sample_classes(
    folder: Path, labels: list[int], *, guidance: float, steps: int, seed: int
) -> list[Image.Image]:
    """Pictures by the standard pipeline of a DiT, one a class id; guided away from the null class."""
    pipeline = DiTPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return _in_parts(pipeline, labels, guidance, steps, seed)


def _in_parts(
    pipeline: Any, wanted: Sequence[str] | Sequence[int], guidance: float, steps: int, seed: int
) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Image.Image] = []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(wanted), 50):
        made = pipeline(
            wanted[start : start + 50],
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=generator,
        )
        pictures += made.images
    return pictures
