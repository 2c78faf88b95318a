"""CLIPs as OpenCLIP saves them: ``open_clip_config.json`` and weights by its names (Ilharco et al. 2021).

Both towers are the transformers that ``transformers.CLIPModel`` computes; only the names differ, and OpenCLIP
keeps query, key and value in one matrix and the projections transposed. Towers of other kinds (ResNets,
models of timm and Hugging Face) are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CLIPConfig

from revelio.backbones.loading import reading
from revelio.backbones.source import Source
from revelio.backbones.weights import Weights, read_weights
from revelio.trust import printable

CONFIG = "open_clip_config.json"
STEMS = ("open_clip_model", "open_clip_pytorch_model")
# What OpenCLIP assumes where its config is silent.
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
RESAMPLE = {"bicubic": 3, "bilinear": 2}
VISION = {"head_width": 64, "mlp_ratio": 4.0}
TEXT = {"context_length": 77, "vocab_size": 49408, "mlp_ratio": 4.0}
NEEDED: dict[str, type] = {"width": int, "layers": int}
# Settings of towers that CLIPModel computes; any other value is of another architecture.
PLAIN: dict[str, tuple[object, ...]] = {
    "timm_model_name": (None,),
    "hf_model_name": (None,),
    "ls_init_value": (None,),
    "attentional_pool": (None, False),
    "pool_type": (None, "tok", "argmax"),
    "no_ln_pre": (None, False),
    "embed_cls": (None, False),
    "no_causal_mask": (None, False),
    "pos_embed_type": (None, "learnable"),
}

NAMES = (
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.(.*)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(.*)", r"vision_model.post_layernorm.\1"),
    (r"visual\.transformer\.resblocks\.(.*)", r"vision_model.encoder.layers.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(.*)", r"text_model.final_layer_norm.\1"),
    (r"transformer\.resblocks\.(.*)", r"text_model.encoder.layers.\1"),
    (r"text_projection", "text_projection.weight"),
)
BLOCK_NAMES = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


@dataclass(frozen=True)
class OpenClip:
    """An OpenCLIP in transformers' terms.

    Attributes:
        config: of a ``CLIPModel``.
        weights: by the ``CLIPModel``'s names.
        processor: as a preprocessor_config.json says it.
    """

    config: CLIPConfig
    weights: Weights
    processor: dict[str, Any]


def read_open_clip(source: Source) -> OpenClip:
    """The CLIP of a folder or hub id that has ``open_clip_config.json``.

    Raises:
        ValueError: a file is missing or unreadable, or a tower is of another kind.
    """
    found = source.json(CONFIG)
    model, pictures = (found.get(key) for key in ("model_cfg", "preprocess_cfg"))
    if not isinstance(model, dict) or not isinstance(pictures or {}, dict):
        raise ValueError(f"{CONFIG} of {source.name} has no `model_cfg`: it is none of OpenCLIP's")
    source.check(CONFIG, model, {"embed_dim": int})
    vision, text = (_tower(source, model, key) for key in ("vision_cfg", "text_cfg"))
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    shared = {"hidden_act": act, "projection_dim": model.get("embed_dim")}
    with reading(f"{CONFIG} of {source.name}"):
        config = CLIPConfig(
            projection_dim=model["embed_dim"],
            vision_config=_sizes(vision | {"heads": vision["width"] // vision["head_width"]})
            | shared
            | {"image_size": vision["image_size"], "patch_size": vision["patch_size"]},
            # 2 stands for OpenCLIP's rule: the text's state is that of the largest id, the end of text.
            text_config=_sizes(text)
            | shared
            | {
                "vocab_size": text["vocab_size"],
                "max_position_embeddings": text["context_length"],
                "eos_token_id": 2,
            },
        )
    weights = read_weights(source, "", STEMS)
    tensors = dict(pair for item in weights.tensors.items() for pair in _renamed(*item))
    return OpenClip(config, Weights(weights.where, tensors), _processor(source, pictures or {}))


def _tower(source: Source, model: Mapping[str, Any], key: str) -> dict[str, Any]:
    tower = model.get(key)
    if not isinstance(tower, dict):
        raise ValueError(f"{CONFIG} of {source.name} has no `{key}`")
    for name, plain in PLAIN.items():
        if tower.get(name) not in plain:
            raise ValueError(
                f"{CONFIG} of {source.name} has {name} = {printable(repr(tower[name]))[:80]} in `{key}`: "
                "only OpenCLIP's own vision transformers and text transformers are supported"
            )
    more = {"image_size": int, "patch_size": int} if key == "vision_cfg" else {"heads": int}
    if isinstance(tower.get("layers"), list):
        raise ValueError(
            f"{CONFIG} of {source.name} has a ResNet: only vision transformers are supported"
        )
    source.check(CONFIG, tower, NEEDED | more)
    return (VISION if key == "vision_cfg" else TEXT) | tower


def _sizes(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": tower["heads"],
    }


def _renamed(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor under its name in a ``CLIPModel``; of one that is unknown, under its own."""
    for pattern, there in NAMES:
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, there, name)
            break
    if name in ("visual_projection.weight", "text_projection.weight"):
        return [(name, tensor.T.contiguous())]
    fused = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
    if fused:
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return [
            (f"{fused[1]}.self_attn.{key}_proj.{fused[2]}", part.clone()) for key, part in parts
        ]
    for theirs, ours in BLOCK_NAMES.items():
        name = name.replace(theirs, ours)
    return [(name, tensor)]


def _processor(source: Source, pictures: Mapping[str, Any]) -> dict[str, Any]:
    how, mode = pictures.get("interpolation", "bicubic"), pictures.get("resize_mode", "shortest")
    if how not in RESAMPLE or mode != "shortest":
        raise ValueError(
            f"{CONFIG} of {source.name} brings pictures to size in a way that is not supported: "
            f"interpolation {printable(repr(how))[:80]}, resize_mode {printable(repr(mode))[:80]}"
        )
    return {
        "image_mean": pictures.get("mean", MEAN),
        "image_std": pictures.get("std", STD),
        "resample": RESAMPLE[how],
    }
