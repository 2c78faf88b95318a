"""From pixels to noised latents: the part that Stable Diffusion and DiT share.

    z_0 = mode of the VAE's posterior * scaling_factor,   z_t = q(z_t | z_0)    (SPEC 1.1)

z_0 is rounded to float16 once, so that cached and fresh latents give the same grids. The noise schedule
is the model's own, read as cumulative alphas: schedulers for sampling (Euler, DPM) add noise in other
units, the training index t means the same for all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float
from torch import Tensor, nn

from revelio.backbones.capture import full_precision
from revelio.backbones.loading import LoadSettings, frozen, reading, use_eager_attention
from revelio.backbones.noise import add_noise, check_timestep, keyed_noise
from revelio.backbones.source import Source
from revelio.backbones.weights import DIFFUSERS, diffusers_part, read_weights
from revelio.trust import printable

MOST_STEPS = 1_000_000
HALF_MAX = torch.finfo(torch.float16).max


class LatentSpace:
    """A frozen VAE encoder and a noise schedule.

    Attributes:
        vae: the autoencoder without its decoder.
        alphas_cumprod: the schedule, one value a training timestep.
    """

    def __init__(
        self, vae: AutoencoderKL, alphas_cumprod: Float[Tensor, " steps"], name: str, multiple: int
    ) -> None:
        self.vae = vae
        self.alphas_cumprod = alphas_cumprod
        self._name = name
        self._multiple = multiple

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c zh zw"]:
        """Latents z_0 in float16, on the model's device.

        Raises:
            ValueError: the pixels' sides don't fit, or the VAE's numbers don't fit in float16.
        """
        height, width = pixels.shape[-2:]
        if height % self._multiple or width % self._multiple:
            raise ValueError(
                f"pixels of {height}x{width} don't fit {self._name}: "
                f"both sides must be multiples of {self._multiple}"
            )
        ready = pixels.to(self.vae.device, non_blocking=True).to(self.vae.dtype)
        if self.vae.device.type == "cpu":
            ready = ready.contiguous(memory_format=torch.channels_last)
        with full_precision():
            posterior = self.vae.encode(ready).latent_dist  # type: ignore[union-attr]
        latents = posterior.mode().float() * self.vae.config["scaling_factor"]
        # Also catches NaN: a VAE may overflow inside when it runs in float16. On CUDA the look would wait for
        # the device: there the activations are looked at when they are written.
        if not latents.is_cuda and not bool((latents.abs() <= HALF_MAX).all()):
            raise ValueError(
                f"the VAE of {self._name} overflows in {self.vae.dtype}: "
                "choose dtype float32 or bfloat16"
            )
        return latents.half().contiguous()

    def noised(
        self, encoded: Float[Tensor, "b c h w"], ids: Sequence[str], *, timestep: int | None,
        seed: int, draw: int,
    ) -> tuple[Float[Tensor, "b c h w"], Tensor]:  # fmt: skip
        """Latents at ``timestep`` in the model's number format, and the timestep as a tensor (b).

        Raises:
            ValueError: the timestep is missing or outside the schedule.
        """
        step = check_timestep(timestep, len(self.alphas_cumprod), self._name)
        noise = keyed_noise(encoded.shape[1:], ids, seed=seed, timestep=step, draw=draw)
        clean = encoded.to(self.vae.device, non_blocking=True)
        if clean.is_cuda:
            # From pinned memory a copy does not wait for the device.
            noise = noise.pin_memory().to(clean.device, non_blocking=True)
        noised = add_noise(clean, noise, self.alphas_cumprod, step).to(self.vae.dtype)
        steps = torch.full((len(noised),), step, device=noised.device, dtype=torch.long)
        return noised, steps


def load_latent_space(source: Source, settings: LoadSettings, multiple: int) -> LatentSpace:
    """Load the VAE's encoder and the schedule of a pipeline; ``multiple`` is what image sizes must be.

    Raises:
        ValueError: a part is missing, unreadable, or of another kind.
    """
    config = source.part_config("vae", "AutoencoderKL")
    weights = read_weights(source, "vae", DIFFUSERS)
    vae = diffusers_part(AutoencoderKL, config, weights, settings.number_format)
    schedule = _schedule(source)
    for unused in ("decoder", "post_quant_conv"):
        setattr(vae, unused, nn.Identity())
    if settings.attention == "eager":
        use_eager_attention(vae)
    vae = frozen(vae, settings.place, convolutional=True)
    return LatentSpace(vae, schedule, source.name, multiple)


def _schedule(source: Source) -> Float[Tensor, " steps"]:
    """The cumulative alphas of the training schedule.

    Raises:
        ValueError: the scheduler's config is missing or says no schedule.
    """
    path = "scheduler/scheduler_config.json"
    config = source.json(path)
    # Any scheduler's config has the betas of the training schedule, which is all that is used. Where they
    # are missing diffusers would take others without a word.
    needed = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    missing = [name for name in needed if config.get(name) is None]
    if missing or not str(config.get("_class_name")).endswith("Scheduler"):
        raise ValueError(
            f"{path} of {source.name} is no scheduler's config with a noise schedule: it is of a "
            f"{printable(config.get('_class_name'))} and lacks {', '.join(missing) or 'nothing else'}"
        )
    steps = config["num_train_timesteps"]
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"{path} of {source.name} has num_train_timesteps {steps!r}")
    with reading(f"{path} of {source.name}"):
        scheduler: Any = DDPMScheduler.from_config(config)
    alphas = scheduler.alphas_cumprod
    if not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise ValueError(f"{path} of {source.name} has betas that are no noise schedule")
    return alphas
