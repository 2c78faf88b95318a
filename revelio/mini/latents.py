"""Latents of the training pictures, encoded once by a mini-vae and kept in a file.

A latent is the posterior's mean times the autoencoder's `scaling_factor`, so that its spread is one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from revelio.mini.data import PictureSet
from revelio.mini.loop import save_whole
from revelio.mini.vae import encode


def load_vae(folder: Path) -> AutoencoderKL:
    """A trained mini-vae, frozen."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    vae.requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)  # pyright: ignore


def scaled_latents(vae: AutoencoderKL, images: torch.Tensor, side: int) -> torch.Tensor:
    """`(n, 4, h, w)` float32 latents of unit spread."""
    return encode(vae, images, side) * vae.config["scaling_factor"]


def cached_latents(vae_folder: Path, pictures: PictureSet, side: int, file: Path) -> torch.Tensor:
    """Half-precision latents of a set, from the file if it is there, else encoded and written."""
    if file.is_file():
        latents = torch.load(file, weights_only=True)
        if len(latents) != len(pictures):
            raise ValueError(f"{file} holds {len(latents)} latents, not {len(pictures)}: delete it")
        return latents
    latents = scaled_latents(load_vae(vae_folder), pictures.images, side).half()
    save_whole(latents, file)
    return latents
