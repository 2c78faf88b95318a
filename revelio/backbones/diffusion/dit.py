"""DiT: class-conditional diffusion transformers, one layer a block (SPEC 2.7).

    pixels (b 3 512 512) -> z0 (b 4 64 64) -> z_t -> tokens (b 1024 1152) a block -> grid (b 1152 32 32)

Two faults of the released tower are put right: the latents are noised at t (there they are clean, D5), and
tokens are transposed onto the grid (there they are viewed as channels, D4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import Request, Shape, register_family
from revelio.backbones.diffusion.transformer import (
    TransformerBackbone,
    load_transformer,
    transformer_configs,
    transformer_shape,
)
from revelio.backbones.source import Source

if TYPE_CHECKING:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from jaxtyping import Int64
    from torch import Tensor

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.vae import LatentSpace


@register_family
class DiTBackbone(TransformerBackbone):
    """A diffusion transformer with its VAE.

    Attributes:
        transformer: the transformer.
        latents: the VAE.
        null_class: the class that stands for none; 1000 for ImageNet.
    """

    family = "dit"
    title = "DiT"
    parts = {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"}  # noqa: RUF012
    pipelines = ("DiTPipeline",)

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        latents: LatentSpace,
        class_names: Mapping[str, int],
        **common: Any,
    ) -> None:
        super().__init__(transformer, latents, **common)
        self.null_class = int(transformer.config["num_embeds_ada_norm"])
        self._class_names = class_names

    @classmethod
    def load(cls, request: Request) -> DiTBackbone:
        """Load transformer and VAE."""
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

        from revelio.backbones.diffusion.vae import load_latent_space

        source = request.source
        config, _ = _configs(source)
        latents = load_latent_space(source, request.settings, request.multiple)
        common = request.common()
        transformer = load_transformer(DiTTransformer2DModel, request, config)
        names = _class_names(source, config["num_embeds_ada_norm"])
        return cls(transformer, latents, names, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the configs of the transformer and the VAE."""
        return transformer_shape(*_configs(source))

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Class labels; a prompt is empty (null class), a class name or a class id.

        Raises:
            ValueError: a prompt that is no class of the model.
        """
        from revelio.backbones.diffusion.conditioning import Conditioning, distinct

        once, rows = distinct(prompts)
        return Conditioning(
            rows, {"class_labels": self.classes(once).to(self._device, non_blocking=True)}
        )

    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """A ``DiTPipeline``."""
        from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

        names: dict[int, str] = {}
        for name, number in self._class_names.items():
            names[number] = f"{names[number]}, {name}" if number in names else name
        return DiTPipeline(
            transformer=self.transformer,
            vae=self.latents.vae,
            scheduler=scheduler,
            id2label=names or None,
        )

    def check(self, timestep: int | None, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a timestep or a prompt that the model does not take."""
        self.classes(prompts)
        super().check(timestep, prompts)

    def classes(self, prompts: Sequence[str]) -> Int64[Tensor, " b"]:
        """The class id of each prompt."""
        import torch

        return torch.tensor([self._class(prompt) for prompt in prompts], dtype=torch.long)

    def _class(self, prompt: str) -> int:
        if not prompt:
            return self.null_class
        if prompt.isdecimal() and int(prompt) < self.null_class:
            return int(prompt)
        if prompt not in self._class_names:
            raise ValueError(
                f"{self.name} is conditioned on classes, not on text like {prompt!r}: give the "
                f"empty prompt, a class id from 0 to {self.null_class - 1}, or a class name of its own"
            )
        return self._class_names[prompt]


def _configs(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the transformer and the VAE; see :func:`transformer_configs`."""
    return transformer_configs(source, DiTBackbone.parts["transformer"], num_embeds_ada_norm=int)


def _class_names(source: Source, classes: int) -> dict[str, int]:
    found = source.json("model_index.json").get("id2label") or {}
    if not isinstance(found, dict) or not all(
        isinstance(names, str) and number.isdecimal() and int(number) < classes
        for number, names in found.items()
    ):
        raise ValueError(
            f"model_index.json of {source.name} has an `id2label` that is no table from class ids "
            f"below {classes} to names"
        )
    return class_names(found)


def class_names(id2label: Mapping[str, str]) -> dict[str, int]:
    """Class ids by name; a class may have several names, parted by commas."""
    return {
        name.strip(): int(number) for number, names in id2label.items() for name in names.split(",")
    }
