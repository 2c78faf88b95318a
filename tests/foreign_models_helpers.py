"""Tiny folders of every family of models: how each is made, what it gives, and how it is changed."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from backbones_helpers import picture, tiny_clip, tiny_dinov2, tiny_dit, tiny_pixart, tiny_sd
from llava_helpers import model_config, tiny_llama, tiny_mpt
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_ext.adapter import add_lora
from llava_ext.checkpoint import load_model, save_model
from llava_ext.config import TowerConfig
from llava_ext.language import assemble, check_words, load_language_model, load_tokenizer
from llava_ext.model_config import TowerShape
from llava_ext.stages import LoraOptions
from revelio.backbones.prompts import ZeroShot
from revelio.backbones.registry import load_backbone
from revelio.diffc.model import DiffC, load_diffc

TEXT = "a small dog on grass"


def of_backbone(layer: str, timestep: int | None, prompt: str = "") -> Callable[[Path], Tensor]:
    def outputs(folder: Path) -> Tensor:
        backbone = load_backbone(str(folder), layers=[layer], device="cpu")
        pixels = torch.stack([backbone.transform(picture(0))])
        prompts = [prompt] if prompt else None
        encoded = backbone.encode(pixels)
        return backbone.activations(encoded, ["a"], [layer], timestep=timestep, prompts=prompts)[
            layer
        ]

    return outputs


def of_zero_shot(folder: Path) -> Tensor:
    return ZeroShot(str(folder), ["a cat", "a dog"], "cpu")._text_rows


@torch.no_grad()
def of_language(folder: Path) -> Tensor:
    model, tokenizer = load_language_model(str(folder)), load_tokenizer(str(folder))
    check_words(tokenizer, model, "it")
    ends: Any = model.generation_config.eos_token_id
    logits = model(input_ids=torch.tensor([tokenizer(TEXT).input_ids])).logits
    return torch.cat([logits.flatten(), torch.tensor([float(ends or -1)])])


@torch.no_grad()
def of_llava(folder: Path) -> Tensor:
    model, tokenizer = load_model(folder)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    logits = model.language_model(input_ids=ids).logits
    projected = model.projectors[0](torch.ones(1, 8, 2, 2))
    return torch.cat([logits.flatten(), projected.flatten()])


@torch.no_grad()
def of_diffc(folder: Path) -> Tensor:
    return load_diffc(folder)(torch.ones(1, 6, 4, 4))


def llava(folder: Path, lora: bool) -> Path:
    language = tiny_llama(folder.with_name(f"{folder.name}-language"))
    config = model_config(language, TowerConfig("clip", "block1", budget=4))
    tokenizer = load_tokenizer(str(language))
    model = assemble(config, load_language_model(str(language)), tokenizer, [TowerShape(8, (2, 2))])
    if lora:
        add_lora(model, LoraOptions(rank=2))
    save_model(model, tokenizer, folder, language="auto" if lora else "whole")
    return folder


def diffc(folder: Path) -> Path:
    grids = {"backbone": "mini-sd", "layer": "up_ft1", "timestep": 25}
    DiffC(6, 3, width=4, class_names=["a", "b", "c"], grids=grids).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Family:
    """How a folder is made, what it gives, and which other family's files it is swapped with."""

    build: Callable[[Path], Path]
    outputs: Callable[[Path], Tensor]
    other: str
    prefix: str = ""  # of the weights that are used


FAMILIES = {
    "sd": Family(tiny_sd, of_backbone("up_ft1", 25, TEXT), "clip"),
    "dit": Family(tiny_dit, of_backbone("block2", 25), "sd"),
    "pixart": Family(tiny_pixart, of_backbone("block1", 25, TEXT), "dit"),
    "clip": Family(tiny_clip, of_backbone("block1", None), "dinov2", "vision_model."),
    "zero-shot": Family(tiny_clip, of_zero_shot, "llama"),
    "dinov2": Family(tiny_dinov2, of_backbone("block1", None), "clip"),
    "llama": Family(tiny_llama, of_language, "mpt"),
    "mpt": Family(tiny_mpt, of_language, "llama"),
    "llava": Family(lambda folder: llava(folder, lora=False), of_llava, "mpt"),
    "llava-lora": Family(lambda folder: llava(folder, lora=True), of_llava, "llama"),
    "diffc": Family(diffc, of_diffc, "llava"),
}


def copy_of(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place / "m" / "model")).relative_to(Path.cwd())


def refusal(family: Family, folder: Path) -> str | None:
    """The line that says why a folder isn't loaded, or None where it is."""
    try:
        family.outputs(folder)
    except (ValueError, KeyError) as error:
        line = str(error.args[0])
        assert line and "\n" not in line and len(line) < 700
        return line
    return None


def change_tensors(path: Path, change: str, prefix: str = "") -> str:
    """Change a weights' file; the name of a tensor that the refusal must mention."""
    tensors = load_file(path)
    named = (key for key in sorted(tensors) if key.startswith(prefix))
    name = next(key for key in named if tensors[key].ndim > 1)
    if change == "one removed":
        del tensors[name]
    elif change == "one added":
        name = "extra.weight"
        tensors[name] = torch.zeros(2)
    elif change == "all renamed":
        tensors = {f"other.{key}": value for key, value in tensors.items()}
    elif change == "another shape":
        tensors[name] = torch.zeros(3, *tensors[name].shape)
    else:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = float(change)
    save_file(tensors, path, {"format": "pt"})
    return name
