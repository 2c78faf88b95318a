"""The Diffusion Classifier: the class whose prompt makes the added noise easiest to predict.

For an image with latents z0 and draws (t_j, e_j), shared by all classes so that their noise cancels,

    class = argmin_c mean_j || e_j - e_theta(sqrt(a_tj) z0 + sqrt(1 - a_tj) e_j, t_j, c) ||^2

(Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier", Eq. 6 and Sec. 3.2).
"""

from __future__ import annotations

import torch

from revelio.mini.denoisers import Denoiser


def even_timesteps(draws: int, low: int = 0, high: int = 1000) -> torch.Tensor:
    """`draws` timesteps spread evenly over [low, high), one in the middle of each part."""
    return (low + (torch.arange(draws) + 0.5) * (high - low) / draws).long()


@torch.no_grad()
def class_errors(
    denoiser: Denoiser,
    latents: torch.Tensor,
    alphas: torch.Tensor,
    timesteps: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Squared error `(n, draws, classes)` of every image, draw and class.

    Args:
        denoiser: The model with its classes' prompts.
        latents: `(n, 4, h, w)` clean latents.
        alphas: Cumulative products of the noise schedule, `(1000,)`.
        timesteps: `(draws,)`, the same for every image.
        generator: Draws the noise, anew for every image and draw.
    """
    prompts = denoiser.prompt_rows()
    classes, draws = len(prompts), len(timesteps)
    errors = torch.empty(len(latents), draws, classes)
    scale = alphas[timesteps].view(-1, 1, 1, 1)
    for i, clean in enumerate(latents):
        noise = torch.randn((draws, *clean.shape), generator=generator)
        noisy = scale.sqrt() * clean + (1 - scale).sqrt() * noise
        for start in range(0, draws, 16):
            part = slice(start, start + 16)
            size = len(noisy[part])
            predicted = denoiser.predict(
                noisy[part].repeat_interleave(classes, 0),
                timesteps[part].repeat_interleave(classes),
                prompts.repeat(size),
            )
            wanted = noise[part].repeat_interleave(classes, 0)
            errors[i, part] = (predicted - wanted).pow(2).mean((1, 2, 3)).view(size, classes)
    return errors


def classify(errors: torch.Tensor) -> torch.Tensor:
    """Predicted class `(n,)` from errors `(n, draws, classes)`: all draws weigh the same."""
    return errors.mean(1).argmin(1)
