"""What layers a model has, from its config files alone: no weights, no torch.

U-Net (SPEC of the paper's layers): ``bottleneck`` is the output of the middle block, ``up_ft0`` … of
decoder block i *after* its upsampler, so that the last two have the same stride. Transformers:
``block0`` … is the output of block i.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from revelio.wording import did_you_mean


@dataclass(frozen=True)
class LayerSpec:
    """A layer's shape.

    Attributes:
        channels: c of a grid (b c h w), or d of tokens (b t d).
        stride: input pixels that a grid cell spans along one side; of tokens, 1.
        kind: whether its activations are on a grid, or a sequence of tokens as in a text encoder.
    """

    channels: int
    stride: int
    kind: Literal["grid", "tokens"] = "grid"


Layers = dict[str, LayerSpec]


def vae_stride(vae: Mapping[str, Any]) -> int:
    """Image pixels a latent cell spans: the VAE halves once less than it has levels."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def unet_multiple(unet: Mapping[str, Any], vae: Mapping[str, Any] | None) -> int:
    """What the image's side must be a multiple of, in pixels: the bottleneck's stride."""
    pixels = 1 if vae is None else vae_stride(vae)
    return pixels * 2 ** (len(unet["block_out_channels"]) - 1)


def unet_layers(unet: Mapping[str, Any], vae: Mapping[str, Any] | None) -> Layers:
    """The layers of a U-Net from its config, behind a VAE of the other config or on pixels."""
    channels = list(unet["block_out_channels"])
    stride = unet_multiple(unet, vae)
    layers: Layers = {}
    # Distilled U-Nets (BK-SDM) come without a middle block.
    if unet.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        layers["bottleneck"] = LayerSpec(channels[-1], stride)
    for index, width in enumerate(reversed(channels)):
        last = index == len(channels) - 1
        stride = stride if last else stride // 2
        layers[f"up_ft{index}"] = LayerSpec(width, stride)
    return layers


def dit_layers(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Layers:
    """The blocks of a ``DiTTransformer2DModel`` behind a VAE, from their two configs."""
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    stride = vae_stride(vae) * transformer["patch_size"]
    return {f"block{i}": LayerSpec(width, stride) for i in range(transformer["num_layers"])}


def flux_layers(transformer: Mapping[str, Any], stride: int) -> Layers:
    """The joint (``double``) and single blocks of a ``FluxTransformer2DModel``, from its config."""
    spec = LayerSpec(transformer["num_attention_heads"] * transformer["attention_head_dim"], stride)
    counts = {"double": transformer["num_layers"], "single": transformer["num_single_layers"]}
    return {f"{kind}{i}": spec for kind, count in counts.items() for i in range(count)}


def vit_layers(vision: Mapping[str, Any], *, norm: bool = False) -> Layers:
    """The blocks of a ViT; with ``norm`` also the last block after the model's final LayerNorm."""
    spec = LayerSpec(vision["hidden_size"], vision["patch_size"])
    layers = {f"block{i}": spec for i in range(vision["num_hidden_layers"])}
    return layers | {"norm": spec} if norm else layers


def text_layers(width: int, blocks: int) -> Layers:
    """The blocks of a text encoder."""
    return {f"block{i}": LayerSpec(width, 1, "tokens") for i in range(blocks)}


def cut_after(known: Mapping[str, LayerSpec], wanted: Iterable[str] | None, name: str) -> Layers:
    """The layers up to the deepest of ``wanted``; None keeps all.

    Raises:
        KeyError: an unknown layer.
        ValueError: no layer at all.
    """
    if wanted is None:
        return dict(known)
    chosen = list(wanted)
    if not chosen:
        raise ValueError(f"no layer of {name} asked for: choose from {listed(known)}")
    check_layers(known, chosen, name)
    order = list(known)
    deepest = max(order.index(layer) for layer in chosen)
    return {layer: known[layer] for layer in order[: deepest + 1]}


def check_layers(known: Mapping[str, LayerSpec], wanted: Iterable[str], name: str) -> None:
    """Raise a KeyError that names the first unknown layer and lists the known ones."""
    for layer in wanted:
        if layer not in known:
            hint = did_you_mean(layer, known, "{!r}")
            raise KeyError(f"unknown layer {layer!r} of {name}: {hint}choose from {listed(known)}")


def check_grid(known: Mapping[str, LayerSpec], layer: str, name: str) -> LayerSpec:
    """The layer's shape, if its activations are on a grid.

    Raises:
        KeyError: an unknown layer; the message lists the known ones.
        ValueError: its activations are tokens.
    """
    check_layers(known, [layer], name)
    if known[layer].kind != "grid":
        raise ValueError(
            f"layer {layer} of {name} gives tokens: a layer on a grid (c h w) is needed"
        )
    return known[layer]


def listed(names: Iterable[str]) -> str:
    """Names for a message; a long run of blocks as ``block0 ... block27``."""
    runs: list[str] = []
    for _, run in groupby(names, key=lambda name: name.rstrip("0123456789")):
        words = list(run)
        runs.append(", ".join(words) if len(words) <= 6 else f"{words[0]} ... {words[-1]}")
    return ", ".join(runs)
