"""DINOv2 as a backbone, with or without register tokens (SPEC 2.6, 3.1).

The layers of :mod:`revelio.backbones.vit`, and ``norm``: the last block after the final LayerNorm, which
is transformers' ``last_hidden_state``. Pixels are normalised with ImageNet's mean and deviation; the
released tower fed it CLIP's (SPEC L15). Position embeddings are interpolated to any image size.
"""

from typing import Any

from torch import nn
from transformers import Dinov2Model, Dinov2WithRegistersModel

from revelio.backbones.layers import cut_after, vit_layers
from revelio.backbones.loading import LoadSettings, frozen, reading
from revelio.backbones.source import Source
from revelio.backbones.vit import VitBackbone, cut_blocks, transform_of
from revelio.backbones.weights import TRANSFORMERS, read_weights, transformers_part

REGISTERS = 4
# The linear classifier that some checkpoints have on top.
HEAD = r"classifier\.(weight|bias)"


def load(source: Source, settings: LoadSettings) -> VitBackbone:
    """Load a ``Dinov2Model`` or ``Dinov2WithRegistersModel``.

    Raises:
        KeyError: an unknown layer.
        ValueError: a setting the model can't take; or its files are missing, unreadable, or don't fit.
    """
    config = source.vision_config()
    kept = cut_after(vit_layers(config, norm=True), settings.layers, source.name)
    size = settings.side(source.crop_size(config["image_size"]), config["patch_size"], source.name)
    with_registers = config["model_type"] == "dinov2_with_registers"
    kind: Any = Dinov2WithRegistersModel if with_registers else Dinov2Model
    with reading(f"config.json of {source.name}"):
        settled = kind.config_class.from_dict(source.json("config.json"))
    model = transformers_part(
        kind,
        settled,
        read_weights(source, "", TRANSFORMERS),
        unused=HEAD,
        dtype=settings.number_format,
        attn_implementation=settings.attention,
    )
    modules = cut_blocks(model, kept)
    if "norm" in kept:
        modules["norm"] = model.layernorm
    else:
        model.layernorm = nn.Identity()
    registers = config.get("num_register_tokens", REGISTERS) if with_registers else 0
    return VitBackbone(
        source.name,
        kept,
        transform_of(source, size),
        frozen(model, settings.place),
        modules,
        other_tokens=1 + registers,
        whole=settings.layers is None,
    )
