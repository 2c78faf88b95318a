"""mini-sd, mini-sd-photo and mini-dit: latent diffusion on cached latents.

With z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) e and signal-to-noise ratio s_t = a_t / (1 - a_t), the loss
is mean min(s_t, gamma) / s_t * || e - e_theta(z_t, t, c) ||^2 (Hang et al. 2023, min-SNR weighting
for epsilon), with the scaled-linear betas of SD-1.5. Timesteps of a batch are stratified: one from
each of its equal parts of [0, 1000).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from revelio.backbones.diffusion.conditioning import Conditioning
from revelio.backbones.diffusion.schedule import Schedule
from revelio.probes.config import DiffusionClassifierConfig
from revelio.probes.diffusion_classifier import classify
from tools.mini.configs import DiffusionConfig, Views
from tools.mini.data import PictureSet, held_out_part
from tools.mini.denoisers import ClassDenoiser, Denoiser, TextDenoiser, build_dit, text_denoiser
from tools.mini.latents import cached_latents
from tools.mini.loop import Trainer
from tools.mini.runs import run

STEPS = 1000
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CHECK_IMAGES, LOSS_IMAGES = 60, 256
CHECK = DiffusionClassifierConfig(samples=(4,), keep=(), timesteps=(100, 700), batch_size=40)


def build_scheduler() -> DDIMScheduler:
    """DDIM with the settings of SD-1.5."""
    return DDIMScheduler(
        num_train_timesteps=STEPS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        **BETAS,  # pyright: ignore
    )


def noise_schedule() -> Schedule:
    """The forward process of SD-1.5, which the models are trained on."""
    return Schedule.ddpm(build_scheduler().alphas_cumprod)


def stratified_timesteps(size: int, generator: torch.Generator) -> torch.Tensor:
    """`(size,)` timesteps in [0, 1000), one uniform offset shared by equal strata, in random order."""
    device = generator.device
    offset = torch.rand(1, generator=generator, device=device)
    shares = (offset + torch.arange(size, device=device) / size) % 1.0
    order = torch.randperm(size, generator=generator, device=device)
    return (shares * STEPS).long().clamp(max=STEPS - 1)[order]


def noise_loss(
    denoiser: Denoiser,
    clean: torch.Tensor,
    rows: torch.Tensor,
    schedule: Schedule,
    gamma: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """The weighted loss above of one batch of latents."""
    timesteps = stratified_timesteps(len(clean), generator).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator, device=generator.device)
    noise = noise.to(clean.device)
    noisy = schedule.add_noise(clean, noise, timesteps)
    predicted = denoiser.predict(
        noisy.contiguous(memory_format=torch.channels_last), timesteps, rows
    )
    ratio = schedule.snr(timesteps).float()
    weight = ratio.clamp(max=gamma) / ratio if gamma > 0 else torch.ones_like(ratio)
    return (weight * (predicted - noise).pow(2).mean((1, 2, 3))).mean()


def build_denoiser(
    config: DiffusionConfig, sets: list[PictureSet], out: Path, device: torch.device | str = "cpu"
) -> Denoiser:
    """The untrained model a config asks for.

    Raises:
        ValueError: Not exactly one of `unet` and `dit` is given.
    """
    if (config.unet is None) == (config.dit is None):
        raise ValueError(f"{config.name}: give either unet or dit")
    if config.unet is not None:
        return text_denoiser(config.unet, out / config.clip, sets, device)
    assert config.dit is not None
    # In training mode every block would drop labels on its own; the null class is drawn by us instead.
    dit = build_dit(config.dit).to(device)  # pyright: ignore
    return ClassDenoiser(dit, sum(len(s.class_names) for s in sets))


def load_latents(
    config: DiffusionConfig,
    sets: list[PictureSet],
    out: Path,
    split: str,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and labels of all sets on the device, classes numbered through.

    Of the training split every view, one after the other; of the others the pictures themselves.
    """
    views = config.views if split == "train" else Views()
    latents, labels, first = [], [], 0
    for pictures in sets:
        suffix = f"-{views.count}-{views.smallest}" if views.count > 1 else ""
        file = out / config.vae / "latents" / f"{pictures.name}-{split}{suffix}.pt"
        vae_folder = out / config.vae / "final"
        rows = cached_latents(vae_folder, pictures, config.side, file, views, device)
        latents.append(rows)
        labels.append((pictures.labels + first).repeat(views.count).to(device))
        first += len(pictures.class_names)
    return torch.cat(latents), torch.cat(labels)


def train_diffusion(
    config: DiffusionConfig,
    sets: list[PictureSet],
    held_out: list[PictureSet],
    folder: Path,
    *,
    resume: bool,
    device: torch.device | str = "cpu",
) -> None:
    """Train and save the averaged model to `folder/final`."""
    torch.manual_seed(config.schedule.seed)
    out = folder.parent
    latents, labels = load_latents(config, sets, out, "train", device)
    held_latents, held_labels = load_latents(config, held_out_part(held_out), out, "test", device)
    denoiser = build_denoiser(config, sets, out, device)
    trainer = Trainer(denoiser.model, config.schedule)
    noising = noise_schedule()

    size = config.schedule.share

    def loss_function(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (size,), generator=generator, device=device)
        rows = denoiser.draw_rows(labels[chosen], config.empty_share, generator)
        clean = latents[chosen].float()
        return noise_loss(denoiser, clean, rows, noising, config.min_snr, generator)

    def check() -> dict[str, float]:
        return measure(denoiser, held_latents.float(), held_labels, noising, config.min_snr)

    denoiser.model.eval()
    if (
        config.schedule.graph
        and trainer.device.type == "cuda"
        and isinstance(denoiser, TextDenoiser)
    ):
        denoiser.record(latents[:size], config.schedule.precision)
    run(trainer, loss_function, folder, resume=resume, check=check)
    if trainer.rank > 0:
        return
    denoiser.model.save_pretrained(folder / "final")  # pyright: ignore
    (folder / "config.txt").write_text(repr(asdict(config)))


def measure(
    denoiser: Denoiser,
    latents: torch.Tensor,
    labels: torch.Tensor,
    schedule: Schedule,
    gamma: float,
) -> dict[str, float]:
    """Held-out loss and a cheap Diffusion Classifier accuracy, on the same noise every time."""
    generator = torch.Generator().manual_seed(1)
    rows = denoiser.draw_rows(labels[:LOSS_IMAGES], 0.0, generator)
    loss = noise_loss(denoiser, latents[:LOSS_IMAGES], rows, schedule, gamma, generator)
    found = {"held_out_loss": round(float(loss), 5)}
    if len(denoiser.prompt_rows()) <= 10:
        classes = Conditioning(denoiser.prompt_rows())
        some, wanted = latents[:CHECK_IMAGES], labels[:CHECK_IMAGES].tolist()
        ids = [str(row) for row in range(len(some))]
        rows = classify(Classifying(denoiser, schedule), some, ids, classes, CHECK)
        right = sum(row.predicted == label for row, label in zip(rows, wanted, strict=True))
        found["diffusion_classifier"] = round(right / len(rows), 4)
    return found


@dataclass(frozen=True)
class Classifying:
    """A denoiser in training, for the Diffusion Classifier: its condition rows are the classes' prompts."""

    denoiser: Denoiser
    schedule: Schedule

    def predict(
        self, x_t: torch.Tensor, t: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The denoiser's noise."""
        return self.denoiser.predict(x_t, t.to(x_t.device), conditioning.rows.to(x_t.device))
