"""Noise schedules: q(x_t | x_0) at a training timestep, signal-to-noise ratio, and what a prediction means.

    x_t = alpha_t x_0 + sigma_t e,   e ~ N(0, 1),   SNR_t = alpha_t^2 / sigma_t^2

    DDPM             alpha_t^2 = prod_{s <= t} (1 - beta_s), sigma_t^2 = 1 - alpha_t^2 (Ho et al. 2020, Eq. 4)
    rectified flow   sigma_t = s u / (1 + (s - 1) u), u = (t + 1) / steps, alpha_t = 1 - sigma_t
                     (Liu et al. 2023; the shift s: Esser et al. 2024, Eq. 23)

A denoiser predicts a combination a x_0 + b e. With x_t that makes two equations for x_0 and e:

    epsilon  e                        sample  x_0
    v_prediction  alpha e - sigma x_0 (Salimans and Ho 2022)        flow  e - x_0

The paper calls its latents "DDIM"; its released code draws fresh unseeded noise in the closed form
(SPEC P1, K5, D15). Here e is a function of (seed, image id, timestep, draw) alone: :func:`keyed_noise`.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.seeds import generator

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Steps = int | Tensor

# The schedules a timestep is usually quoted for: betas from first to last over 1000 steps.
REFERENCES = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
# Logarithms of signal-to-noise ratios beyond this are no noise, or nothing but noise (zero terminal SNR).
MOST_LOG_SNR = 80.0


class Schedule:
    """A forward process on its training timesteps, and the kind of prediction that was trained for it.

    Attributes:
        alphas: what the image is multiplied by at each timestep, float32, on the CPU.
        sigmas: what the noise is multiplied by, float32, on the CPU.
        prediction: what the denoiser's output means.
        times: what the denoiser is told at each timestep; for DDPM the timestep itself.
    """

    def __init__(
        self,
        alphas: Float[Tensor, " steps"],
        sigmas: Float[Tensor, " steps"],
        prediction: Prediction = "epsilon",
        *,
        times: Tensor | None = None,
        log_snr: Float[Tensor, " steps"] | None = None,
    ) -> None:
        """Any alphas and sigmas; see :meth:`ddpm` and :meth:`rectified_flow` for the usual ones.

        Raises:
            ValueError: they are no forward process, or the prediction is unknown.
        """
        if prediction not in get_args(Prediction):
            known = ", ".join(get_args(Prediction))
            raise ValueError(f"unknown prediction {prediction!r}: choose from {known}")
        if alphas.shape != sigmas.shape or alphas.ndim != 1 or not len(alphas):
            raise ValueError(f"{tuple(alphas.shape)} alphas and {tuple(sigmas.shape)} sigmas")
        both = torch.stack([alphas, sigmas])
        if not bool((both.isfinite() & (both >= 0)).all() and (both.sum(0) > 0).all()):
            raise ValueError("alphas and sigmas must be finite, at least 0, and not both 0")
        self.alphas, self.sigmas = alphas.float(), sigmas.float()
        self.prediction: Prediction = prediction
        self.times = torch.arange(len(alphas)) if times is None else times
        exact = 2 * (alphas.double().log() - sigmas.double().log()) if log_snr is None else log_snr
        self._log_snr = exact.clamp(-MOST_LOG_SNR, MOST_LOG_SNR)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def ddpm(
        cls, alphas_cumprod: Float[Tensor, " steps"], prediction: Prediction = "epsilon"
    ) -> "Schedule":
        """The schedule of cumulative products of 1 - beta, of whatever betas; the last may be 0.

        Raises:
            ValueError: one is not in [0, 1].
        """
        kept = alphas_cumprod.detach().cpu()
        if not bool(((kept >= 0) & (kept <= 1)).all()):
            raise ValueError(
                "cumulative alphas must be from 0 to 1: these betas are no noise schedule"
            )
        single, exact = kept.float(), kept.double()
        return cls(
            single.sqrt(), (1 - single).sqrt(), prediction, log_snr=(exact / (1 - exact)).log()
        )

    @classmethod
    def rectified_flow(cls, steps: int = 1000, shift: float = 1.0) -> "Schedule":
        """Straight lines from image to noise; the denoiser is told ``steps`` times sigma.

        Args:
            steps: how many training timesteps, ``num_train_timesteps``.
            shift: above 1 it moves timesteps towards noise; SD3's is 3.
        """
        fraction = torch.arange(1, steps + 1, dtype=torch.float32) / steps
        sigmas = shift * fraction / (1 + (shift - 1) * fraction)
        return cls(1 - sigmas, sigmas, "flow", times=sigmas * steps)

    def __len__(self) -> int:
        return len(self.alphas)

    def add_noise(
        self, x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Steps
    ) -> Float[Tensor, "b ..."]:
        """A draw of q(x_t | x_0), in float32 on x0's device.

        Args:
            x0: images or latents.
            noise: of the same shape, on any device.
            t: one timestep, or one an image.
        """
        alpha, sigma = self._at(t, x0)
        return alpha * x0.float() + sigma * noise.to(x0.device)

    def target(
        self, x0: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], t: Steps
    ) -> Float[Tensor, "b ..."]:
        """What a denoiser is trained to predict at x_t, in float32 on x0's device."""
        a, b = self._combination(*self._at(t, x0))
        return a * x0.float() + b * noise.to(x0.device)

    def snr(self, t: Steps) -> Tensor:
        """Signal-to-noise ratio in double precision, of one timestep or of several."""
        table = self._log_snr.to(t.device) if isinstance(t, Tensor) else self._log_snr
        return table[t].exp()

    def match(self, other: "Schedule", t: int) -> int:
        """This schedule's timestep whose signal-to-noise ratio is nearest to ``other``'s at ``t``.

        Nearest in the logarithm. Equal timesteps are not equal noise: t = 25 of Stable Diffusion is t = 43
        of DiT (SPEC 2.8).

        Raises:
            ValueError: the timestep is outside ``other``.
        """
        other.check(t, "the reference schedule")
        return int((self._log_snr - other._log_snr[t]).abs().argmin())

    def epsilon(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Steps
    ) -> Float[Tensor, "b ..."]:
        """The noise that the denoiser's output at x_t stands for, in float32.

        Raises:
            ValueError: from a predicted image where x_t holds no noise.
        """
        if self.prediction == "epsilon":
            return output.float()
        alpha, sigma = self._at(t, x_t)
        a, b = self._combination(alpha, sigma)
        return (alpha * output.float() - a * x_t.float()) / self._determinant(
            alpha * b - sigma * a, t
        )

    def x0(
        self, output: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Steps
    ) -> Float[Tensor, "b ..."]:
        """The clean image or latents that the denoiser's output at x_t stands for, in float32.

        Raises:
            ValueError: from predicted noise where x_t holds nothing else (zero terminal SNR).
        """
        if self.prediction == "sample":
            return output.float()
        alpha, sigma = self._at(t, x_t)
        a, b = self._combination(alpha, sigma)
        return (b * x_t.float() - sigma * output.float()) / self._determinant(
            alpha * b - sigma * a, t
        )

    def check(self, t: int | None, name: str) -> int:
        """The timestep, if it is one of the schedule's; see :func:`check_timestep`."""
        return check_timestep(t, len(self), name)

    def _at(self, t: Steps, like: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of each image, to be multiplied with ``like``."""
        if not isinstance(t, Tensor):  # where they are is the host's memory: it need not wait
            found = (self.alphas[t], self.sigmas[t])
            alpha, sigma = (each.to(like.device, non_blocking=True) for each in found)
            return alpha, sigma
        if like.device not in self._tables:
            self._tables[like.device] = (self.alphas.to(like.device), self.sigmas.to(like.device))
        shape = (-1, *[1] * (like.ndim - 1))
        alphas, sigmas = self._tables[like.device]
        index = t.to(like.device, non_blocking=not t.is_cuda)
        return alphas[index].view(shape), sigmas[index].view(shape)

    def _combination(self, alpha: Tensor, sigma: Tensor) -> tuple[Any, Any]:
        """(a, b) of the prediction a x_0 + b e."""
        known: dict[str, tuple[Any, Any]] = {
            "epsilon": (0.0, 1.0),
            "sample": (1.0, 0.0),
            "v_prediction": (-sigma, alpha),
            "flow": (-1.0, 1.0),
        }
        return known[self.prediction]

    def _determinant(self, value: Tensor, t: Steps) -> Tensor:
        if not bool((value != 0).all()):
            raise ValueError(
                f"a prediction of kind {self.prediction} says nothing of the other part at timestep "
                f"{t if isinstance(t, int) else t.tolist()}, where only one is left"
            )
        return value


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


def reference_schedule(name: str) -> Schedule:
    """A well-known schedule of 1000 steps, to match timesteps against.

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
    return Schedule.ddpm((1 - betas).cumprod(0))


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
