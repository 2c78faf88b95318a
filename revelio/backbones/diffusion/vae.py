"""A VAE: pixels to latents and back; or pixels as they are, of a model without one.

    z_0 = (mode of the posterior - shift_factor) * scaling_factor                             (SPEC 1.1)
    pixels = decoder(z_0 / scaling_factor + shift_factor)

Only newer VAEs (SD3, Flux) have a shift. z_0 is rounded to float16 once, so that cached and fresh latents
give the same activations.
"""

import math

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float
from torch import Tensor, nn

from revelio.backbones.hooks import full_precision
from revelio.backbones.loading import LoadSettings, frozen, use_eager_attention
from revelio.backbones.source import Source
from revelio.backbones.weights import DIFFUSERS, diffusers_part, read_weights
from revelio.trust import printable

HALF_MAX = torch.finfo(torch.float16).max


def check_sides(pixels: Tensor, multiple: int, name: str) -> None:
    """Raise a ValueError unless both sides of the pixels are multiples of ``multiple``."""
    height, width = pixels.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(
            f"pixels of {height}x{width} don't fit {name}: both sides must be multiples of {multiple}"
        )


class PixelSpace:
    """What stands in a VAE's place before a model on pixels: they stay as they are."""

    def __init__(self, name: str, multiple: int, device: torch.device) -> None:
        self._name = name
        self._multiple = multiple
        self._device = device

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The pixels, moved to the model's device: there is nothing to share between passes.

        Raises:
            ValueError: the pixels' sides don't fit.
        """
        check_sides(pixels, self._multiple, self._name)
        return pixels.to(self._device, non_blocking=not pixels.is_cuda)

    def decode(self, z: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The pixels."""
        return z.to(self._device)


class LatentSpace:
    """A frozen VAE; of a model that is cut only the encoder.

    Attributes:
        vae: the autoencoder.
    """

    def __init__(self, vae: AutoencoderKL, name: str, multiple: int) -> None:
        self.vae = vae
        self._name = name
        self._multiple = multiple
        self._shift: float = vae.config.get("shift_factor") or 0.0
        for value in (self._shift, vae.config["scaling_factor"]):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(
                    f"the VAE's config of {name} has {printable(repr(value))[:80]} as scaling_factor or "
                    "shift_factor: it must be a number"
                )

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c zh zw"]:
        """Latents z_0 in float16, on the model's device.

        Raises:
            ValueError: the pixels' sides don't fit, or the VAE's numbers don't fit in float16.
        """
        check_sides(pixels, self._multiple, self._name)
        ready = pixels.to(self.vae.device, non_blocking=not pixels.is_cuda).to(self.vae.dtype)
        if self.vae.device.type == "cpu":
            ready = ready.contiguous(memory_format=torch.channels_last)
        with full_precision():
            posterior = self.vae.encode(ready).latent_dist  # type: ignore[union-attr]
        latents = (posterior.mode().float() - self._shift) * self.vae.config["scaling_factor"]
        # Also catches NaN: a VAE may overflow inside when it runs in float16. On CUDA the look would wait for
        # the device: there the activations are looked at when they are written.
        if not latents.is_cuda and not bool((latents.abs() <= HALF_MAX).all()):
            raise ValueError(
                f"the VAE of {self._name} overflows in {self.vae.dtype}: "
                "choose dtype float32 or bfloat16"
            )
        return latents.half().contiguous()

    def decode(self, z: Float[Tensor, "b c zh zw"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels of latents, from -1 to 1 up to the decoder's own error.

        Raises:
            ValueError: the model was cut, which leaves the decoder out.
        """
        if isinstance(self.vae.decoder, nn.Identity):
            raise ValueError(
                f"the VAE of {self._name} was loaded without its decoder: name no layers"
            )
        scaled = z.to(self.vae.device).float() / self.vae.config["scaling_factor"] + self._shift
        with full_precision():
            return self.vae.decode(scaled.to(self.vae.dtype)).sample  # type: ignore[union-attr]


def load_latent_space(source: Source, settings: LoadSettings, multiple: int) -> LatentSpace:
    """Load the VAE of a pipeline; for a model that is cut, its encoder alone.

    Args:
        source: the pipeline.
        settings: how to load it.
        multiple: what the images' sides must be multiples of, in pixels.

    Raises:
        ValueError: it is missing, unreadable, or of another kind.
    """
    config = source.vae_config()
    weights = read_weights(source, "vae", DIFFUSERS)
    vae = diffusers_part(AutoencoderKL, config, weights, settings.number_format)
    if settings.layers is not None:
        for unused in ("decoder", "post_quant_conv"):
            setattr(vae, unused, nn.Identity())
    if settings.attention == "eager":
        use_eager_attention(vae)
    return LatentSpace(frozen(vae, settings.place, convolutional=True), source.name, multiple)
