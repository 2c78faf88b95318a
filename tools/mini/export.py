"""Trained parts -> the folders that diffusers and transformers load: the layout of SD-1.5, DiT and CLIP.

Weights go out in half precision. A folder is put together whole, then its files take the older ones' places.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from revelio.files import write_folder
from tools.mini.clip import processor
from tools.mini.configs import ClipConfig, DiffusionConfig, VaeConfig
from tools.mini.diffusion import build_scheduler

MiniConfig = VaeConfig | ClipConfig | DiffusionConfig


def stable_diffusion(
    runs: Path,
    config: DiffusionConfig,
    unet: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> StableDiffusionPipeline:
    """mini-sd's pipeline from its training runs.

    Args:
        runs: The folder of the training runs.
        config: Which VAE and mini-clip it was trained with.
        unet: Another U-Net folder than the run's `final`.
        dtype: Of all weights.
    """
    clip = runs / config.clip
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(runs / config.vae / "final", torch_dtype=dtype),
        text_encoder=CLIPTextModel.from_pretrained(clip / "text_encoder", dtype=dtype),
        tokenizer=CLIPTokenizer.from_pretrained(clip / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(
            unet or runs / config.name / "final", torch_dtype=dtype
        ),
        scheduler=build_scheduler(),  # pyright: ignore
        safety_checker=None,  # pyright: ignore
        feature_extractor=processor(config.side),
        requires_safety_checker=False,
    )


def dit_pipeline(
    runs: Path, config: DiffusionConfig, names: list[str], dtype: torch.dtype = torch.float32
) -> DiTPipeline:
    """mini-dit's pipeline from its training runs, with its class names."""
    return DiTPipeline(
        transformer=DiTTransformer2DModel.from_pretrained(
            runs / config.name / "final", torch_dtype=dtype
        ),
        vae=AutoencoderKL.from_pretrained(runs / config.vae / "final", torch_dtype=dtype),
        scheduler=build_scheduler(),  # pyright: ignore
        id2label={i: name for i, name in enumerate(names)},  # pyright: ignore
    )


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder, then move its files into `target`, whose README.md stays as it is."""

    def fill(folder: Path) -> None:
        write(folder)
        if (target / "README.md").is_file():
            (folder / "README.md").unlink(missing_ok=True)

    write_folder(target, fill)


def export(runs: Path, config: MiniConfig, target: Path, names: list[str]) -> None:
    """Write a shipped folder in half precision.

    Args:
        runs: The folder of the training runs.
        config: The model's own config.
        target: The folder to write, such as `models/mini-sd`.
        names: The class names of a DiT.
    """
    if isinstance(config, DiffusionConfig) and config.unet is not None:
        pipeline = stable_diffusion(runs, config, dtype=torch.float16)
        write_whole(target, lambda folder: _write_pipeline(pipeline, folder))
    elif isinstance(config, DiffusionConfig):
        dit = dit_pipeline(runs, config, names, dtype=torch.float16)
        write_whole(target, lambda folder: _write_dit(dit, folder, names))
    elif isinstance(config, ClipConfig):
        write_whole(
            target, lambda folder: _write_clip(runs / config.name / "final", folder, config)
        )
    else:
        raise ValueError(f"{config.name} is shipped inside the pipelines that use it")


def _write_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    # Without torchvision transformers names its stand-in; the folder must load with torchvision too.
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))


def _write_dit(pipeline: DiTPipeline, folder: Path, names: list[str]) -> None:
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    # As in the published DiT folders; `save_pretrained` leaves the class names out.
    ids = {"id2label": {str(i): name for i, name in enumerate(names)}}
    index.write_text(json.dumps(json.loads(index.read_text()) | ids, indent=2) + "\n")


def _write_clip(source: Path, folder: Path, config: ClipConfig) -> None:
    CLIPModel.from_pretrained(source, dtype=torch.float16).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(source).save_pretrained(folder)
    processor(config.side).save_pretrained(folder)
