"""The Diffusion Classifier: the class whose prompt makes the added noise easiest to predict.

For an image with latents z0 and draws (t_j, e_j), shared by all classes so that their noise cancels,

    class = argmin_c mean_j || e_j - e_theta(sqrt(a_tj) z0 + sqrt(1 - a_tj) e_j, t_j, c) ||^2

(Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier", Eq. 6 and Sec. 3.2).
"""

from __future__ import annotations

import torch

from revelio.backbones.diffusion.schedule import Schedule
from tools.mini.denoisers import Denoiser

BATCH = 40


def even_timesteps(draws: int, low: int = 0, high: int = 1000) -> torch.Tensor:
    """`draws` timesteps spread evenly over [low, high), one in the middle of each part."""
    return (low + (torch.arange(draws) + 0.5) * (high - low) / draws).long()


@torch.no_grad()
def image_errors(
    denoiser: Denoiser,
    clean: torch.Tensor,
    schedule: Schedule,
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    prompts: torch.Tensor,
) -> torch.Tensor:
    """Squared error `(draws, classes)` of one image's latents `(4, h, w)`.

    Args:
        denoiser: The model.
        clean: The latents.
        schedule: Of the noise.
        timesteps: `(draws,)`.
        noise: `(draws, 4, h, w)`, shared by all classes.
        prompts: Condition rows of the classes to compare, `(classes,)`.
    """
    classes = len(prompts)
    noisy = schedule.add_noise(clean.expand_as(noise), noise, timesteps)
    chunk = max(1, BATCH // classes)
    errors = []
    for some, times, wanted in zip(
        noisy.split(chunk), timesteps.split(chunk), noise.split(chunk), strict=True
    ):
        predicted = denoiser.predict(
            some.repeat_interleave(classes, 0),
            times.repeat_interleave(classes),
            prompts.repeat(len(some)),
        )
        off = predicted - wanted.repeat_interleave(classes, 0)
        errors.append(off.pow(2).mean((1, 2, 3)).view(len(some), classes))
    return torch.cat(errors)


def class_errors(
    denoiser: Denoiser,
    latents: torch.Tensor,
    schedule: Schedule,
    timesteps: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Squared error `(n, draws, classes)` of every image, draw and class.

    The timesteps are the same for every image, the noise is drawn anew for each.
    """
    prompts = denoiser.prompt_rows().to(latents.device)
    timesteps = timesteps.to(latents.device)
    rows = []
    for clean in latents:
        noise = torch.randn((len(timesteps), *clean.shape), generator=generator).to(clean.device)
        rows.append(image_errors(denoiser, clean, schedule, timesteps, noise, prompts))
    return torch.stack(rows)


def staged_errors(
    denoiser: Denoiser,
    latents: torch.Tensor,
    schedule: Schedule,
    timesteps: torch.Tensor,
    generator: torch.Generator,
    *,
    every: int = 4,
    keep: int = 3,
) -> torch.Tensor:
    """As `class_errors`, but most draws are spent on the classes still in question.

    Every `every`-th draw goes to all classes; the others only to the `keep` best of these
    (Li et al. 2023, Sec. 3.3). Left out are NaN, which `classify` never chooses.
    """
    prompts = denoiser.prompt_rows()
    early = torch.arange(every // 2, len(timesteps), every)
    late = torch.tensor([i for i in range(len(timesteps)) if i not in set(early.tolist())])
    errors = torch.full((len(latents), len(timesteps), len(prompts)), torch.nan)
    for i, clean in enumerate(latents):
        noise = torch.randn((len(timesteps), *clean.shape), generator=generator)
        first = image_errors(denoiser, clean, schedule, timesteps[early], noise[early], prompts)
        errors[i, early] = first
        best = first.mean(0).topk(keep, largest=False).indices
        rest = image_errors(denoiser, clean, schedule, timesteps[late], noise[late], prompts[best])
        errors[i, late[:, None], best] = rest
    return errors


def classify(errors: torch.Tensor) -> torch.Tensor:
    """Predicted class `(n,)` from errors `(n, draws, classes)`: all draws weigh the same."""
    return errors.mean(1).nan_to_num(nan=torch.inf).argmin(1)
