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

from revelio.backbones.hooks import as_activation, block_list, read_layers, tokens_to_grid
from revelio.backbones.layers import Layers, LayerSpec, check_layers
from revelio.backbones.loading import check_batch
from revelio.backbones.source import Source, check_side
from revelio.data.transforms import Interpolation, SquareTransform
from revelio.trust import printable

# PIL's numbers of resampling filters, as preprocessor_config.json stores them.
RESAMPLING: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
# What a preprocessor's config may only say in one way.
FIXED = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "rescale_factor": (1 / 255, 0.00392156862745098),
}
SHORTEST_EDGE = (
    "CLIP",
    "Bit",
    "ConvNext",
)  # the processors of which a plain `size` is the shorter side
WARPED = 384  # from here on ConvNeXT's processor stretches


class VitBackbone:
    """A cut ViT; make one with :func:`revelio.backbones.clip.load` or ``dinov2.load``.

    Attributes:
        model: the transformers model, cut.
        modules: the modules whose outputs are the layers.
        other_tokens: how many tokens stand before the patches: the class token, and registers.
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
        whole: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.layers: Mapping[str, LayerSpec] = layers
        self.transform = transform
        self.model = model
        self.modules = modules
        self.other_tokens = other_tokens
        self._whole = whole
        self._settings = dict(settings or {})

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The pixels, moved to the model's device: there is nothing to share between passes."""
        device = next(self.model.parameters()).device
        return pixels.to(device, non_blocking=not pixels.is_cuda)

    @torch.no_grad()
    def activations(
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
        """See :meth:`Backbone.activations`; seed and draw change nothing.

        Raises:
            ValueError: a timestep, or a prompt that isn't empty: a ViT knows neither.
        """
        check_layers(self.layers, layers, self.name)
        check_batch(len(encoded), ids, prompts)
        self.check(timestep, prompts or ())
        parameter = next(self.model.parameters())
        pixels = encoded.to(parameter.device, parameter.dtype)
        patch = next(iter(self.layers.values())).stride
        height, width = (side // patch for side in pixels.shape[-2:])
        found = read_layers(self, layers, lambda: self.model(pixels, **self._settings))
        return {
            layer: as_activation(tokens_to_grid(tokens[:, self.other_tokens :], height, width))
            for layer, tokens in found.items()
        }

    @torch.no_grad()
    def embed(self, encoded: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2 d"]:
        """See :meth:`EmbeddingModel.embed`: the class token after the final norm, and the patches' mean."""
        if not self._whole:
            raise ValueError(
                f"{self.name} was cut when it was loaded, so it can't embed: load it whole, with layers=None"
            )
        parameter = next(self.model.parameters())
        output = self.model(encoded.to(parameter.device, parameter.dtype), **self._settings)
        patches = output.last_hidden_state[:, self.other_tokens :].mean(1)
        return torch.stack([output.pooler_output, patches], dim=1).float()

    def module(self, layer: str) -> nn.Module:
        """See :meth:`Backbone.module`; the output are tokens (b t c), the class token first."""
        check_layers(self.layers, [layer], self.name)
        return self.modules[layer]

    @property
    def network(self) -> nn.Module:
        """The transformers model."""
        return self.model

    def check(self, timestep: int | None, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a timestep, or a prompt that isn't empty: a ViT knows neither."""
        if timestep is not None:
            raise ValueError(f"{self.name} works without noise: leave the timestep {timestep} out")
        if any(prompts):
            raise ValueError(f"{self.name} takes no prompts: use the prompt policy `empty`")


def cut_blocks(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Drop the blocks after the last of ``layers``, and give the modules of the others."""
    blocks = block_list(model)
    depth = sum(layer.startswith("block") for layer in layers)
    del blocks[depth:]
    return {f"block{i}": block for i, block in enumerate(blocks)}


def transform_of(source: Source, size: int) -> SquareTransform:
    """What the model's own image processor does, from its config.

    Raises:
        ValueError: there is no such config, or it holds other values.
    """
    return square_transform(source, size, source.processor())


def square_transform(source: Source, size: int, processor: Mapping[str, Any]) -> SquareTransform:
    """The transform that a preprocessor's config says, for squares of ``size`` pixels.

    Raises:
        ValueError: it holds other values.
    """
    resample = processor.get("resample", 2 if _kind(processor).startswith("ViT") else 3)
    if resample not in RESAMPLING:
        raise ValueError(f"the preprocessor config of {source.name} has resample {resample!r}")
    for name, wanted in FIXED.items():
        value = processor.get(name, wanted[0])
        if value not in wanted:
            raise ValueError(
                f"the preprocessor config of {source.name} has {name} {printable(repr(value))[:80]}: "
                f"only {wanted[0]!r} is supported"
            )
    resize, stretch = _resized(source, processor, size)
    return SquareTransform(
        size,
        _triple(source, "image_mean", processor["image_mean"]),
        _triple(source, "image_std", processor["image_std"], least=1e-6),
        RESAMPLING[resample],
        offset="down",
        resize=resize if resize != size else None,
        stretch=stretch,
    )


def _kind(processor: Mapping[str, Any]) -> str:
    return str(processor.get("image_processor_type") or processor.get("feature_extractor_type", ""))


def _resized(source: Source, processor: Mapping[str, Any], size: int) -> tuple[int, bool]:
    """What the shorter side is resized to before the crop, and whether both sides are; as transformers do.

    For another ``size`` than the processor's own, the crop takes the same share of the picture.

    Raises:
        ValueError: the config says no size of a square.
    """
    entry, kind = processor.get("size"), _kind(processor)
    if entry is None:
        return size, False
    side = check_side("size", entry, source.name)
    if isinstance(entry, Mapping):
        stretch = "height" in entry
    else:  # configs of older versions, by the default of each class
        cut = processor.get("do_center_crop", "crop_size" in processor)
        stretch = not kind.startswith(SHORTEST_EDGE) if kind else not cut
    own = source.crop_size(side)
    if kind.startswith("ConvNext"):
        stretch, own = side >= WARPED, side
        share = max(0.01, float(processor.get("crop_pct") or 224 / 256))
        side = side if stretch else int(side / share)
    return round(side * size / own), stretch


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
