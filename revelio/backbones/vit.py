"""Vision transformers as backbones without noise: patch tokens on a grid, class token dropped.

``block{i}`` is the output of block i, before any final LayerNorm. In the words of transformers it is
``hidden_states[i + 1]`` (``hidden_states[0]`` are the embeddings, for CLIP after its ``pre_layrnorm``), so
that LLaVA's ``hidden_states[-2]`` of a 24-block CLIP is ``block22``, and DINOv2's ``x_prenorm`` its last
block.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from revelio.backbones.capture import as_grid, captured, tokens_to_grid
from revelio.backbones.loading import check_batch
from revelio.backbones.source import Source
from revelio.backbones.specs import Layers, check_layers
from revelio.data.transforms import Interpolation, SquareTransform

# PIL's numbers of resampling filters, as preprocessor_config.json stores them.
RESAMPLING: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class VitBackbone:
    """A cut ViT; make one with :func:`revelio.backbones.clip.load` or ``dinov2.load``.

    Attributes:
        model: the transformers model, cut.
        modules: the modules whose outputs are the layers.
    """

    def __init__(
        self,
        name: str,
        layers: Layers,
        transform: SquareTransform,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        *,
        other_tokens: int = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.layers = layers
        self.transform = transform
        self.model = model
        self.modules = modules
        self._other_tokens = other_tokens
        self._settings = dict(settings or {})

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The pixels, moved to the model's device: there is nothing to share between passes."""
        return pixels.to(next(self.model.parameters()).device)

    @torch.no_grad()
    def grids(
        self,
        encoded: Float[Tensor, "b 3 h w"],
        ids: Sequence[str],
        layers: Sequence[str],
        *,
        timestep: int | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> dict[str, Tensor]:
        """See :meth:`Backbone.grids`; seed and draw change nothing.

        Raises:
            ValueError: a timestep, or a prompt that isn't empty: a ViT knows neither.
        """
        check_layers(self.layers, layers, self.name)
        check_batch(len(encoded), ids, prompts)
        if timestep is not None:
            raise ValueError(f"{self.name} works without noise: leave the timestep {timestep} out")
        if any(prompts or ()):
            raise ValueError(f"{self.name} takes no prompts: use the prompt policy `empty`")
        parameter = next(self.model.parameters())
        pixels = encoded.to(parameter.device, parameter.dtype)
        patch = next(iter(self.layers.values())).stride
        height, width = (side // patch for side in pixels.shape[-2:])
        with captured({layer: self.modules[layer] for layer in layers}) as kept:
            self.model(pixels, **self._settings)
        return {
            layer: as_grid(tokens_to_grid(kept[layer][:, self._other_tokens :], height, width))
            for layer in layers
        }


def cut_blocks(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Drop the blocks after the last of ``layers``, and give the modules of the others."""
    # The list of blocks has stood at different depths in different versions of transformers.
    blocks = next(
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and path.split(".")[-1] in ("layer", "layers")
    )
    depth = sum(layer.startswith("block") for layer in layers)
    del blocks[depth:]
    return {f"block{i}": block for i, block in enumerate(blocks)}


def transform_of(source: Source, size: int) -> SquareTransform:
    """The model's own normalisation and resampling, from its processor's config.

    Raises:
        ValueError: there is no such config, or it holds other values.
    """
    processor = source.processor()
    resample = processor.get("resample", 3)
    if resample not in RESAMPLING:
        raise ValueError(f"the preprocessor config of {source.name} has resample {resample!r}")
    return SquareTransform(
        size,
        _triple(source, "image_mean", processor["image_mean"]),
        _triple(source, "image_std", processor["image_std"], least=1e-6),
        RESAMPLING[resample],
    )


def _triple(
    source: Source, name: str, values: object, least: float = -1e6
) -> tuple[float, float, float]:
    numbers = values if isinstance(values, list | tuple) else ()
    if len(numbers) != 3 or not all(
        isinstance(number, int | float) and least <= number <= 1e6 for number in numbers
    ):
        raise ValueError(
            f"the preprocessor config of {source.name} has {name} {values!r}: three numbers are needed"
        )
    red, green, blue = numbers
    return (red, green, blue)
