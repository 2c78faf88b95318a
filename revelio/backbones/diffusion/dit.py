"""DiT: class-conditional diffusion transformers, one layer a block (SPEC 2.7).

    pixels (b 3 512 512) -> z0 (b 4 64 64) -> z_t -> tokens (b 1024 1152) a block -> grid (b 1152 32 32)

Two faults of the released tower are put right: the latents are noised at t (there they are clean, D5), and
tokens are transposed onto the grid (there they are viewed as channels, D4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from revelio.backbones.diffusion.base import DiffusionBackbone, Request, Shape, register_family
from revelio.backbones.layers import dit_layers, vae_stride
from revelio.backbones.source import Source

if TYPE_CHECKING:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from jaxtyping import Int64
    from torch import Tensor, nn

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.vae import LatentSpace

NEEDED: dict[str, type] = dict.fromkeys(
    (
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "patch_size",
        "sample_size",
        "num_embeds_ada_norm",
    ),
    int,
)


@register_family
class DiTBackbone(DiffusionBackbone):
    """A diffusion transformer with its VAE.

    Attributes:
        transformer: the transformer.
        latents: the VAE.
        null_class: the class that stands for none; 1000 for ImageNet.
    """

    family = "dit"
    kind = "DiT"
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
        super().__init__(**common)
        self.transformer = transformer
        self.latents = latents
        self.null_class = int(transformer.config["num_embeds_ada_norm"])
        self._class_names = class_names

    @classmethod
    def load(cls, request: Request) -> DiTBackbone:
        """Load transformer and VAE."""
        from revelio.backbones.diffusion.vae import load_latent_space

        source = request.source
        config, vae = _configs(source)
        if config.get("in_channels") != vae["latent_channels"]:
            raise ValueError(
                f"the transformer of {source.name} takes {config.get('in_channels')} channels, its VAE "
                f"gives {vae['latent_channels']}: they belong to different models"
            )
        latents = load_latent_space(source, request.settings, request.multiple)
        common = request.common()
        transformer = _load_transformer(request, config)
        names = _class_names(source, config["num_embeds_ada_norm"])
        return cls(transformer, latents, names, **common)

    @classmethod
    def shape(cls, source: Source) -> Shape:
        """From the configs of the transformer and the VAE."""
        config, vae = _configs(source)
        stride = vae_stride(vae)
        multiple = stride * config["patch_size"]
        return Shape(dit_layers(config, vae), config["sample_size"] * stride, multiple)

    @property
    def network(self) -> nn.Module:
        """The transformer."""
        return self.transformer

    def layer_module(self, layer: str) -> nn.Module:
        """One of the transformer's blocks; its output are tokens (b t c)."""
        return self.transformer.transformer_blocks[int(layer.removeprefix("block"))]

    def as_grid(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Tokens on the grid of their patches."""
        from revelio.backbones.hooks import tokens_to_grid

        patch = self.transformer.config["patch_size"]
        height, width = (side // patch for side in x_t.shape[-2:])
        return tokens_to_grid(output, height, width)

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Class labels; a prompt is empty (null class), a class name or a class id.

        Raises:
            ValueError: a prompt that is no class of the model.
        """
        from revelio.backbones.diffusion.conditioning import Conditioning, distinct

        once, rows = distinct(prompts)
        return Conditioning(rows, {"class_labels": self.classes(once).to(self._device)})

    def denoise(self, x_t: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's prediction; a learned variance, the channels behind it, is left out."""
        output = self.transformer(x_t, times, **conditioning.arguments()).sample
        return output[:, : x_t.shape[1]]

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
    """The configs of the transformer and the VAE.

    Raises:
        ValueError: one is missing, of another class, or says no size.
    """
    config = source.part_config("transformer", "DiTTransformer2DModel", NEEDED)
    return config, source.vae_config()


def _load_transformer(request: Request, config: Mapping[str, Any]) -> DiTTransformer2DModel:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    from revelio.backbones.loading import frozen, use_eager_attention
    from revelio.backbones.weights import DIFFUSERS, diffusers_part, read_weights

    settings = request.settings
    weights = read_weights(request.source, "transformer", DIFFUSERS)
    transformer = diffusers_part(DiTTransformer2DModel, config, weights, settings.number_format)
    # The head after the last block stays: it is a thousandth of the work, and forward() calls it.
    blocks = transformer.transformer_blocks[: len(request.layers)]
    transformer.transformer_blocks = blocks
    if settings.attention == "eager":
        use_eager_attention(transformer)
    return frozen(transformer, settings.place)


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
