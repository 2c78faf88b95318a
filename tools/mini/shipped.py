"""Pictures sampled from shipped folders, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image


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
