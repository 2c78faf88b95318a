"""The layers of a diffusers pipeline, its text encoders' included: what steering reads and edits.

    text_encoder.block9                            CLIP-L of Stable Diffusion 1.x and 2.x: tokens (b 77 768)
    text_encoder.block10+text_encoder_2.block28    SDXL's two encoders, joined by channels: (b 77 2048)
    text_encoder_2.block22                         T5 of Flux: (b 512 4096); SD3's is text_encoder_3
    bottleneck, up_ft0 ...                         the U-Net's;  block0 ...  a DiT's or SD3's;
    double0 ..., single0 ...                       Flux's

The pipeline's own code tokenizes, encodes and samples: nothing of it is replaced. A text encoder's block is
counted from 0; `block9` is the output of the tenth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from revelio.backbones.diffusion.unet import layer_module
from revelio.backbones.hooks import HasLayers, as_activation, read_layers
from revelio.backbones.layers import (
    Layers,
    LayerSpec,
    check_layers,
    dit_layers,
    flux_layers,
    unet_layers,
)
from revelio.trust import printable

JOIN = "+"


@dataclass(frozen=True)
class PipelineKind:
    """What a pipeline is made of.

    Attributes:
        title: what messages call it.
        denoiser: the component that denoises, and
        denoiser_class: its class.
        tokenizers: for each text encoder's component that of its tokenizer, in the order they are called.
        batch: where the unconditional half of a guided batch is: first; at the rows of the null class; or
            in calls of its own.
        time_scale: what the denoiser's argument `timestep` is multiplied by to give 0 to 1000.
        output_position: of the image's tokens in what a block of the denoiser gives.
        block: what the transformer's blocks are called, before their number.
    """

    title: str
    denoiser: str
    denoiser_class: str
    tokenizers: Mapping[str, str]
    batch: Literal["first half", "null class", "separate calls"] = "first half"
    time_scale: int = 1
    output_position: int = 0
    block: str = "block"


_CLIP = {"text_encoder": "tokenizer"}
_TWO = _CLIP | {"text_encoder_2": "tokenizer_2"}
_THREE = _TWO | {"text_encoder_3": "tokenizer_3"}
KINDS = (
    PipelineKind("Stable Diffusion 1.x and 2.x", "unet", "UNet2DConditionModel", _CLIP),
    PipelineKind("SDXL", "unet", "UNet2DConditionModel", _TWO),
    PipelineKind(
        "Stable Diffusion 3", "transformer", "SD3Transformer2DModel", _THREE, output_position=1
    ),
    PipelineKind(
        "Flux", "transformer", "FluxTransformer2DModel", _TWO, "separate calls", 1000, 1, "double"
    ),
    PipelineKind("DiT", "transformer", "DiTTransformer2DModel", {}, "null class"),
)


@dataclass(frozen=True)
class Tokens:
    """A text layer's output.

    Attributes:
        states: (b t d) in float32.
        content: which positions are no padding: up to the first end-of-text token, which is included.
    """

    states: Float[Tensor, "b t d"]
    content: Bool[Tensor, "b t"]


class PipelineLayers:
    """A pipeline's layers by name, to read and to edit with :func:`~revelio.backbones.hooks.hooked`.

    Args:
        pipeline: a diffusers pipeline of one of :data:`KINDS`.
        name: what results call the model.

    Attributes:
        layers: those of the text encoders (kind `tokens`), then the denoiser's.
        kind: what the pipeline is made of.

    Raises:
        ValueError: a pipeline of an unknown kind; the message lists the known ones.
    """

    def __init__(self, pipeline: Any, name: str = "the pipeline") -> None:
        self.pipeline, self.name = pipeline, name
        self.kind = _kind_of(pipeline)
        components = pipeline.components
        # Of transformers' and diffusers' own classes, each with a `config`.
        self.encoders: dict[str, Any] = {
            part: components[part]
            for part in self.kind.tokenizers
            if components.get(part) is not None
        }
        self.denoiser: Any = components[self.kind.denoiser]
        self.layers: Layers = {
            f"{part}.block{index}": LayerSpec(encoder.config.hidden_size, 1, "tokens")
            for part, encoder in self.encoders.items()
            for index in range(encoder.config.num_hidden_layers)
        }
        self.layers |= self._denoiser_layers()

    def module(self, layer: str) -> nn.Module:
        """Where a layer's output appears; a joined layer has several: see :meth:`parts`.

        Raises:
            KeyError: an unknown layer; the message lists the known ones.
        """
        check_layers(self.layers, [layer], self.name)
        part, _, block = layer.partition(".")
        if block:
            return _blocks(self.encoders[part])[int(block.removeprefix("block"))]
        if self.kind.denoiser == "unet":
            return layer_module(self.denoiser, layer)
        if layer.startswith("single"):
            return self.denoiser.single_transformer_blocks[int(layer.removeprefix("single"))]
        return self.denoiser.transformer_blocks[int(layer.removeprefix(self.kind.block))]

    def owner(self, layer: str) -> HasLayers:
        """What :func:`~revelio.backbones.hooks.hooked` takes to read or edit a layer."""
        return self if self.is_text(layer) else _Denoiser(self)

    def parts(self, layer: str) -> dict[str, int]:
        """The layers that a name joins, with the width of each.

        Raises:
            KeyError: an unknown layer.
            ValueError: it joins layers that are not of text encoders.
        """
        names = layer.split(JOIN)
        check_layers(self.layers, names, self.name)
        if len(names) > 1 and not all(self.is_text(name) for name in names):
            raise ValueError(
                f"{layer} joins layers of the denoiser: only text encoders' are joined"
            )
        return {name: self.layers[name].channels for name in names}

    def is_text(self, layer: str) -> bool:
        """Whether a layer is a text encoder's."""
        return "." in layer

    def encoder_of(self, layer: str) -> nn.Module:
        """The text encoder that a layer belongs to."""
        return self.encoders[layer.partition(".")[0]]

    @torch.no_grad()
    def tokens(self, texts: Sequence[str], layer: str) -> Tokens:
        """What a text layer gives for some texts, tokenized and padded as the pipeline does.

        The encoders run up to the layer; no denoiser does.

        Raises:
            KeyError: an unknown layer.
            ValueError: it is no text encoder's.
        """
        parts = self.parts(layer)
        if not self.is_text(layer):
            known = ", ".join(name for name in self.layers if self.is_text(name)) or "none"
            raise ValueError(f"layer {layer} of {self.name} takes no text: text layers are {known}")
        ids: dict[str, Tensor] = {}
        handles = [
            encoder.register_forward_pre_hook(partial(_note_ids, ids, part), with_kwargs=True)
            for part, encoder in self.encoders.items()
        ]
        order = list(self.layers)
        last = max(parts, key=order.index)
        try:
            found = read_layers(self, list(parts), lambda: self.encode(list(texts)), until=last)
        finally:
            for handle in handles:
                handle.remove()
        content = [self._content(name.partition(".")[0], ids) for name in parts]
        return Tokens(
            as_activation(torch.cat([found[name] for name in parts], dim=-1)),
            torch.stack(content).any(dim=0),
        )

    def encode(self, texts: list[str]) -> Any:
        """The pipeline's own `encode_prompt`, of the conditional branch alone."""
        takes = signature(self.pipeline.encode_prompt).parameters
        arguments: dict[str, Any] = {
            name: None for name in ("prompt_2", "prompt_3") if name in takes
        }
        if "do_classifier_free_guidance" in takes:
            arguments["do_classifier_free_guidance"] = False
        return self.pipeline.encode_prompt(
            prompt=texts,
            device=self.pipeline._execution_device,
            num_images_per_prompt=1,
            **arguments,
        )

    def _content(self, part: str, ids: Mapping[str, Tensor]) -> Bool[Tensor, "b t"]:
        end = self.pipeline.components[self.kind.tokenizers[part]].eos_token_id
        ended = (ids[part] == end).cumsum(dim=1)
        return (ended - (ids[part] == end).to(ended)) == 0

    def _denoiser_layers(self) -> Layers:
        config = self.denoiser.config
        if self.kind.denoiser == "unet":
            return unet_layers(config, None)
        if self.kind.title == "Flux":
            return flux_layers(config, 1)
        return dit_layers(config, {"block_out_channels": [0]})


class _Denoiser:
    """The denoiser's layers alone: of blocks that give text and image tokens, the image's."""

    def __init__(self, layers: PipelineLayers) -> None:
        self.module = layers.module
        self.output_position = layers.kind.output_position


def _kind_of(pipeline: Any) -> PipelineKind:
    components = getattr(pipeline, "components", {})
    for kind in KINDS:
        denoiser = components.get(kind.denoiser)
        encoders = {name for name in components if name.startswith("text_encoder")}
        if type(denoiser).__name__ == kind.denoiser_class and encoders == set(kind.tokenizers):
            return kind
    known = ", ".join(kind.title for kind in KINDS)
    raise ValueError(
        f"a {printable(type(pipeline).__name__)} can't be steered: known are the pipelines of {known}"
    )


def _blocks(encoder: Any) -> nn.ModuleList:
    count = encoder.config.num_hidden_layers
    return next(
        module
        for module in encoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )


def _note_ids(
    ids: dict[str, Tensor], part: str, _module: nn.Module, args: Any, kwargs: Any
) -> None:
    found = args[0] if args else kwargs["input_ids"]
    ids[part] = found.cpu()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has been applied to a module or to one inside it: its hooks may never run."""
    return any(
        hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in module.modules()
    )
