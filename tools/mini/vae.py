"""mini-vae: a small `AutoencoderKL`, pictures to 16x16x4 latents of unit spread.

Loss: mean |x - x'| + mean (x - x')^2 + kl_weight * mean KL(q(z|x) || N(0, 1)), the recipe of Stable
Diffusion's autoencoder without its adversarial and perceptual terms (there is no pretrained network
to be perceptual with).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from tools.mini.configs import VaeConfig
from tools.mini.data import PictureSet, random_flip, to_pixels
from tools.mini.loop import Trainer
from tools.mini.runs import log, run

HELD_OUT = 500


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """The untrained autoencoder; one halving less than it has levels."""
    levels = len(config.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=config.side,
        block_out_channels=config.channels,  # pyright: ignore
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore
        layers_per_block=config.blocks,
        norm_num_groups=config.groups,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


def posterior_of(vae: AutoencoderKL, pixels: torch.Tensor) -> DiagonalGaussianDistribution:
    """q(z | x) of pixels `(b, 3, h, w)`."""
    return vae.encode(pixels, return_dict=False)[0]  # pyright: ignore


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pixels of unscaled latents."""
    return vae.decode(latents, return_dict=False)[0]  # pyright: ignore


def vae_loss(vae: AutoencoderKL, pixels: torch.Tensor, noise: torch.Tensor, kl_weight: float):
    """Reconstruction and KL of one batch, and the mean of each."""
    posterior = posterior_of(vae, pixels)
    latents = posterior.mean + posterior.std * noise
    output = decode(vae, latents)
    reconstruction = F.l1_loss(output, pixels) + F.mse_loss(output, pixels)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return reconstruction + kl_weight * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, side: int, *, flip: bool = False):
    """Posterior means of uint8 pictures, `(n, 4, h, w)` float32, not yet scaled."""
    rows = []
    for chunk in images.split(256):
        pixels = to_pixels(chunk.to(vae.device), side)
        pixels = pixels.flip(-1) if flip else pixels
        rows.append(posterior_of(vae, pixels.contiguous(memory_format=torch.channels_last)).mean)
    return torch.cat(rows).contiguous()


def _draw(sets: list[PictureSet], side: int, batch: int, generator: torch.Generator):
    """A batch of pictures, mirrored at random, each set by its share of the pictures."""
    sizes = torch.tensor([float(len(s)) for s in sets])
    counts = torch.bincount(
        torch.multinomial(sizes, batch, replacement=True, generator=generator), minlength=len(sets)
    )
    parts = [
        to_pixels(s.images[torch.randint(len(s), (int(n),), generator=generator)], side)
        for s, n in zip(sets, counts, strict=True)
        if n
    ]
    return random_flip(torch.cat(parts), generator).contiguous(memory_format=torch.channels_last)


def measure(vae: AutoencoderKL, images: torch.Tensor, side: int) -> dict[str, float]:
    """Held-out error in grey levels of 255, and the spread of means and posteriors."""
    pixels = to_pixels(images, side)
    posterior = posterior_of(vae, pixels)
    output = decode(vae, posterior.mean).clamp(-1, 1)
    mse = F.mse_loss(output, pixels)
    return {
        "psnr": round(float(10 * torch.log10(4.0 / mse)), 3),
        "mean_abs_error": round(float(F.l1_loss(output, pixels)) * 127.5, 3),
        "latent_mean": round(float(posterior.mean.mean()), 4),
        "latent_std": round(float(posterior.mean.std()), 4),
        "posterior_std": round(float(posterior.std.mean()), 4),
    }


def train_vae(
    config: VaeConfig, sets: list[PictureSet], held_out: torch.Tensor, folder: Path, *, resume: bool
) -> None:
    """Train, set `scaling_factor` to one over the latents' spread, and save to `folder/final`."""
    torch.manual_seed(config.schedule.seed)
    vae = build_vae(config).to(memory_format=torch.channels_last)  # pyright: ignore
    trainer = Trainer(vae, config.schedule)

    def loss_function(generator: torch.Generator) -> torch.Tensor:
        pixels = _draw(sets, config.side, config.schedule.share, generator)
        shape = (len(pixels), 4, 16, 16)
        return vae_loss(vae, pixels, torch.randn(shape, generator=generator), config.kl_weight)

    held = held_out[:HELD_OUT]
    run(
        trainer, loss_function, folder, resume=resume, check=lambda: measure(vae, held, config.side)
    )
    if trainer.rank > 0:
        return
    vae.eval()
    rows = torch.randperm(len(sets[0]), generator=torch.Generator().manual_seed(0))[:5000]
    spread = float(encode(vae, sets[0].images[rows], config.side).std())
    vae.register_to_config(scaling_factor=1.0 / spread)
    vae.save_pretrained(folder / "final")
    log(folder, {"scaling_factor": 1.0 / spread})
