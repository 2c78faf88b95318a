"""Latents of the training pictures, encoded once by a mini-vae and kept in a file.

A latent is the posterior's mean times the autoencoder's `scaling_factor`, so that its spread is one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from tools.mini.configs import Views
from tools.mini.data import PictureSet, random_view
from tools.mini.loop import save_whole
from tools.mini.vae import encode, posterior_of

CHUNK = 1024


def load_vae(folder: Path, device: torch.device | str = "cpu") -> AutoencoderKL:
    """A trained mini-vae, frozen."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    vae.requires_grad_(False)
    return vae.to(device, memory_format=torch.channels_last)  # pyright: ignore


def scaled_latents(vae: AutoencoderKL, images: torch.Tensor, side: int) -> torch.Tensor:
    """`(n, 4, h, w)` float32 latents of unit spread."""
    return encode(vae, images, side) * vae.config["scaling_factor"]


@torch.no_grad()
def view_latents(
    vae: AutoencoderKL, images: torch.Tensor, side: int, views: Views, seed: int = 0
) -> torch.Tensor:
    """`(count * n, 4, h, w)` half-precision latents: the pictures themselves, then their other views."""
    scale = vae.config["scaling_factor"]
    rows = [scaled_latents(vae, images, side).half()]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1, views.count):
        for chunk in images.split(CHUNK):
            pixels = random_view(chunk.to(vae.device), side, views.smallest, generator)
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            rows.append((posterior_of(vae, pixels).mean * scale).half())
    return torch.cat(rows).contiguous()


def cached_latents(
    vae_folder: Path,
    pictures: PictureSet,
    side: int,
    file: Path,
    views: Views = Views(),  # noqa: B008  # frozen
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Half-precision latents of a set's views, from the file if it is there, else encoded and written."""
    wanted = views.count * len(pictures)
    if file.is_file():
        latents = torch.load(file, map_location=device, weights_only=True)
        if len(latents) != wanted:
            raise ValueError(f"{file} holds {len(latents)} latents, not {wanted}: delete it")
        return latents
    latents = view_latents(load_vae(vae_folder, device), pictures.images, side, views)
    save_whole(latents, file)
    return latents
