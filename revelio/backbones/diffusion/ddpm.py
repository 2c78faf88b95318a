"""Pixel-space DDPMs: an unconditional or class-conditional U-Net without a VAE (Ho et al. 2020).

    pixels x0 (b 3 256 256) -> x_t -> U-Net cut after the deepest wanted layer

The layers are named as Stable Diffusion's: ``bottleneck`` and ``up_ft0`` ... after each decoder block's
upsampler; the last has the pixels' own resolution. Folders of a ``DDPMPipeline`` or ``DDIMPipeline``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import Request, Shape, register_family
from revelio.backbones.diffusion.unet import PixelUNetBackbone, load_unet, unet_config, unet_shape
from revelio.backbones.source import Source
from revelio.wording import plural

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from revelio.backbones.diffusion.conditioning import Conditioning

CHANNELS = 3


@register_family
class PixelDDPM(PixelUNetBackbone):
    """A U-Net on pixels.

    Attributes:
        unet: the U-Net.
        classes: how many classes it is conditioned on; None for an unconditional model.
    """

    family = "ddpm"
    title = "pixel-space DDPM"
    parts = {"unet": "UNet2DModel"}  # noqa: RUF012
    without = ("vae", "vqvae", "movq", "text_encoder")
    pipelines = ("DDPMPipeline", "DDIMPipeline")

    def __init__(self, unet: UNet2DModel, multiple: int, **common: Any) -> None:
        super().__init__(unet, multiple, **common)
        self.classes: int | None = unet.config["num_class_embeds"]

    @classmethod
    def load(cls, request: Request) -> PixelDDPM:
        """Load the U-Net."""
        from diffusers.models.unets.unet_2d import UNet2DModel

        unet = load_unet(UNet2DModel, request, _config(request.source))
        return cls(unet, request.multiple, **request.common())

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the U-Net's config."""
        return unet_shape(_config(source), None)

    def check(self, timestep: int | None, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a timestep or a prompt that the model does not take."""
        for prompt in prompts:
            self._class(prompt)
        super().check(timestep, prompts)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Class labels, of a class-conditional model; a prompt is a class id.

        Raises:
            ValueError: a prompt that is no class of the model, or any for an unconditional one.
        """
        import torch

        from revelio.backbones.diffusion.conditioning import Conditioning, distinct

        once, rows = distinct(prompts)
        labels = [self._class(prompt) for prompt in once]
        if self.classes is None:
            return Conditioning(rows)
        told = torch.tensor(labels).to(self._device, non_blocking=True)
        return Conditioning(rows, {"class_labels": told})

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """A ``DDPMPipeline``.

        Raises:
            ValueError: the model is class-conditional, for which diffusers has no pipeline.
        """
        from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

        if self.classes is not None:
            raise ValueError(
                f"diffusers has no pipeline for {self.name}, which is class-conditional"
            )
        return DDPMPipeline(unet=self.unet, scheduler=scheduler)

    def _class(self, prompt: str) -> int:
        if self.classes is None:
            if prompt:
                raise ValueError(f"{self.name} takes no prompts: use the prompt policy `empty`")
            return 0
        if not (prompt.isdecimal() and int(prompt) < self.classes):
            raise ValueError(
                f"{self.name} is conditioned on classes, not on text like {prompt!r}, and has no class "
                f"that stands for none: give a class id from 0 to {self.classes - 1}"
            )
        return int(prompt)


def _config(source: Source) -> dict[str, Any]:
    """The config of the U-Net.

    Raises:
        ValueError: it is missing, says no size, or is of a model on other inputs than RGB pixels.
    """
    config = unet_config(source, "UNet2DModel", refused=("class_embed_type",))
    if config.get("num_class_embeds") is not None:
        source.check("unet/config.json", config, {"num_class_embeds": int})
    if config["in_channels"] != CHANNELS:
        raise ValueError(
            f"{source.name} takes {plural(config['in_channels'], 'input channel')}: a pixel-space DDPM takes "
            f"{CHANNELS}"
        )
    if "Skip" in f"{config.get('down_block_types')}{config.get('up_block_types')}":
        raise ValueError(f"{source.name} has skip blocks (NCSN++), which are not supported")
    return config
