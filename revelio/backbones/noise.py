"""Noise at a training timestep: q(x_t | x_0), keyed by image, and timesteps of equal noise.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,   e ~ N(0, 1),   a_t = prod_{s <= t} (1 - beta_s)

The paper calls its latents "DDIM"; its released code draws fresh unseeded noise in this closed form
(SPEC P1, K5, D15). Here e is a function of (seed, image id, timestep, draw) alone.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.seeds import generator

# The schedules a timestep is usually quoted for: betas from first to last over 1000 steps.
REFERENCES = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}


def keyed_noise(
    shape: Sequence[int], ids: Sequence[str], *, seed: int, timestep: int, draw: int
) -> Float[Tensor, "b c h w"]:
    """Standard Gaussian noise, one block of ``shape`` (c h w) an image, on the CPU in float32.

    An image's noise is bit-equal whatever else is in the batch and wherever it stands in it.
    """
    if not ids:
        return torch.empty(0, *shape)
    return torch.stack(
        [
            torch.randn(
                *shape,
                generator=generator(int(seed), "noise", str(image), int(timestep), int(draw)),
            )
            for image in ids
        ]
    )


def add_noise(
    clean: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, " steps"],
    timestep: int,
) -> Float[Tensor, "b c h w"]:
    """x_t from x_0 and the noise, in float32."""
    kept = alphas_cumprod[timestep].float().to(clean.device)
    return kept.sqrt() * clean.float() + (1 - kept).sqrt() * noise.to(clean.device)


def signal_to_noise(alphas_cumprod: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
    """a_t / (1 - a_t) at each timestep."""
    kept = alphas_cumprod.double()
    return kept / (1 - kept)


def reference_schedule(name: str) -> Float[Tensor, "1000"]:
    """The cumulative alphas of a well-known schedule, to match timesteps against.

    Args:
        name: ``scaled_linear`` (Stable Diffusion), ``linear`` (DiT) or ``cosine`` (DeepFloyd-IF).

    Raises:
        ValueError: another name.
    """
    steps = torch.arange(1000, dtype=torch.float64)
    if name == "cosine":
        # Nichol and Dhariwal 2021, Eq. 17, with betas capped at 0.999.
        fraction = torch.cat([steps, torch.tensor([1000.0])]).double() / 1000
        curve = ((fraction + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    elif name in REFERENCES:
        first, last = REFERENCES[name]
        if name == "scaled_linear":
            betas = torch.linspace(first**0.5, last**0.5, 1000, dtype=torch.float64) ** 2
        else:
            betas = torch.linspace(first, last, 1000, dtype=torch.float64)
    else:
        known = ", ".join([*REFERENCES, "cosine"])
        raise ValueError(f"unknown schedule {name!r}: choose from {known}")
    return (1 - betas).cumprod(0)


def match_timestep(
    timestep: int,
    reference: Float[Tensor, " steps"],
    own: Float[Tensor, " own_steps"],
) -> int:
    """The timestep of ``own`` whose signal-to-noise ratio is nearest to the reference's at ``timestep``.

    Nearest in the logarithm. Equal timesteps are not equal noise: t = 25 of Stable Diffusion is t = 43
    of DiT (SPEC 2.8).

    Args:
        timestep: index into ``reference``.
        reference: cumulative alphas of the schedule that ``timestep`` is quoted for.
        own: those of the model, such as a backbone's ``alphas_cumprod``.

    Raises:
        ValueError: the timestep is outside the reference.
    """
    check_timestep(timestep, len(reference), "the reference schedule")
    wanted = signal_to_noise(reference)[timestep].log()
    return int((signal_to_noise(own.to(reference.device)).log() - wanted).abs().argmin())


def check_timestep(timestep: int | None, steps: int, name: str) -> int:
    """The timestep, if it is one of ``steps``.

    Raises:
        ValueError: it is missing, no integer, or outside the schedule.
    """
    if timestep is None:
        raise ValueError(f"{name} works on noised images: give a timestep from 0 to {steps - 1}")
    if isinstance(timestep, bool) or not isinstance(timestep, int):
        raise ValueError(f"timestep {timestep!r} is no integer: {name} takes 0 to {steps - 1}")
    if not 0 <= timestep < steps:
        raise ValueError(f"timestep {timestep} is outside {name}: it takes 0 to {steps - 1}")
    return timestep
