"""DiT: class-conditional diffusion transformers, one grid a block (SPEC 2.7).

    pixels (b 3 512 512) -> z0 (b 4 64 64) -> z_t -> tokens (b 1024 1152) a block -> grid (b 1152 32 32)

Two faults of the released tower are put right: the latents are noised at t (there they are clean, D5), and
tokens are transposed onto the grid (there they are viewed as channels, D4).
"""

from collections.abc import Mapping, Sequence

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.backbones.capture import as_grid, captured, tokens_to_grid
from revelio.backbones.latents import LatentSpace, load_latent_space
from revelio.backbones.loading import (
    LoadSettings,
    check_batch,
    frozen,
    use_eager_attention,
)
from revelio.backbones.source import Source
from revelio.backbones.specs import Layers, check_layers, cut_after, dit_layers, vae_stride
from revelio.backbones.weights import DIFFUSERS, diffusers_part, read_weights
from revelio.data.transforms import SquareTransform


class DiTBackbone:
    """A diffusion transformer with its VAE; make one with :func:`load`.

    Attributes:
        transformer: the blocks, cut.
        latents: VAE and noise schedule.
        null_class: the class that stands for none; 1000 for ImageNet.
    """

    def __init__(
        self,
        name: str,
        layers: Layers,
        image_size: int,
        transformer: DiTTransformer2DModel,
        latents: LatentSpace,
        class_names: Mapping[str, int],
    ) -> None:
        self.name = name
        self.layers = layers
        self.transform = SquareTransform(image_size)
        self.transformer = transformer
        self.latents = latents
        self.null_class = int(transformer.config["num_embeds_ada_norm"])
        self._class_names = class_names

    @property
    def alphas_cumprod(self) -> Float[Tensor, " steps"]:
        """The noise schedule, for :func:`revelio.backbones.noise.match_timestep`."""
        return self.latents.alphas_cumprod

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c zh zw"]:
        """VAE latents z_0 in float16; see :meth:`LatentSpace.encode`."""
        return self.latents.encode(pixels)

    @torch.no_grad()
    def grids(
        self,
        encoded: Float[Tensor, "b c h w"],
        ids: Sequence[str],
        layers: Sequence[str],
        *,
        timestep: int | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> dict[str, Tensor]:
        """See :meth:`Backbone.grids`; a prompt is empty (null class), a class name or a class id.

        Raises:
            ValueError: beside the usual, a prompt that is no class of the model.
        """
        check_layers(self.layers, layers, self.name)
        check_batch(len(encoded), ids, prompts)
        classes = self.classes([""] * len(encoded) if prompts is None else prompts)
        noised, steps = self.latents.noised(encoded, ids, timestep=timestep, seed=seed, draw=draw)
        blocks = self.transformer.transformer_blocks
        wanted = {layer: blocks[int(layer.removeprefix("block"))] for layer in layers}
        with captured(wanted) as kept:
            self.transformer(noised, steps, class_labels=classes.to(noised.device))
        patch = self.transformer.config["patch_size"]
        height, width = (side // patch for side in noised.shape[-2:])
        return {layer: as_grid(tokens_to_grid(kept[layer], height, width)) for layer in layers}

    def classes(self, prompts: Sequence[str]) -> Int64[Tensor, " b"]:
        """The class id of each prompt."""
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


def load(source: Source, settings: LoadSettings) -> DiTBackbone:
    """Load vae, transformer and scheduler.

    Raises:
        KeyError: an unknown layer.
        ValueError: a setting the model can't take; or a part is missing, unreadable, or doesn't fit.
    """
    config = source.part_config("transformer", "DiTTransformer2DModel")
    vae_config = source.part_config("vae", "AutoencoderKL")
    if config.get("in_channels") != vae_config["latent_channels"]:
        raise ValueError(
            f"the transformer of {source.name} takes {config.get('in_channels')} channels, its VAE gives "
            f"{vae_config['latent_channels']}: they belong to different models"
        )
    kept = cut_after(dit_layers(config, vae_config), settings.layers, source.name)
    multiple = vae_stride(vae_config) * config["patch_size"]
    side = settings.side(source, multiple)
    latents = load_latent_space(source, settings, multiple)
    weights = read_weights(source, "transformer", DIFFUSERS)
    transformer = diffusers_part(DiTTransformer2DModel, config, weights, settings.number_format)
    # The head after the last block stays: it is a thousandth of the work, and forward() calls it.
    transformer.transformer_blocks = transformer.transformer_blocks[: len(kept)]
    if settings.attention == "eager":
        use_eager_attention(transformer)
    names = _class_names(source, config["num_embeds_ada_norm"])
    return DiTBackbone(source.name, kept, side, frozen(transformer, settings.place), latents, names)


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
