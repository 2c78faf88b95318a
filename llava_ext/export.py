"""A finished model for others: with its adapter folded in, or its projectors under the names others read.

    merged        a model of our own whose language model holds the adapter's changes
    llava         mm_projector.bin and config.json: LLaVA's form for projectors on a language model as it was
    transformers  mm_projector.safetensors, with the names of transformers' LLaVA

    <model or transformer>.mm_projector.{0,2}.{weight,bias}          one tower, as LLaVA's own mlp2x_gelu
    <...>.mm_projector.{tower}.{mlp.0,tokens.conv1,...}.{...}        several, as the plug-in builds them
    multi_modal_projector.linear_{1,2}.{weight,bias}

:mod:`llava_ext.import_llava` reads them all. LLaVA loads its form with the plug-in installed
(:mod:`llava_ext.llava_plugin`), by ``--model-path FOLDER --model-base LANGUAGE_MODEL``; the folder's name
must hold ``llava``, and ``mpt`` where the language model is an MPT.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_ext.adapter import merge_adapter
from llava_ext.checkpoint import load_model, save_model
from llava_ext.config import ExportForm
from llava_ext.llava_plugin import PROJECTOR_TYPE, has_stock_projector, tower_names
from llava_ext.model import LlavaModel
from revelio.files import write_folder
from revelio.run_dir import write_json


def export_model(path: str | Path, out: Path, form: ExportForm) -> list[str]:
    """Write a finished model in another form.

    Args:
        path: the ``final`` folder of a run, or a hub id.
        out: a folder of its own.
        form: see the module.

    Returns:
        The files written.

    Raises:
        ValueError: it is no such folder, or the form can't hold what the model is made of.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files: choose another folder")
    model, tokenizer = load_model(path)
    if form == "merged":
        merge_adapter(model)
        save_model(model, tokenizer, out)
        return sorted(file.name for file in out.iterdir())
    return export_projectors(model, out, form)


def export_projectors(model: LlavaModel, out: Path, form: ExportForm) -> list[str]:
    """Write a model's projectors under the names that others read; see :func:`export_model`."""
    writers: dict[str, Callable[[LlavaModel, Path], None]] = {
        "llava": _write_llava,
        "transformers": _write_transformers,
    }
    if form not in writers:
        raise ValueError(f"form {form!r} is none of {', '.join(get_args(ExportForm))}")
    return write_folder(out, lambda folder: writers[form](model, folder))


def _write_llava(model: LlavaModel, folder: Path) -> None:
    towers = model.settings.towers
    if len(towers) > 1 and model.settings.fusion != "interleave":
        raise ValueError(
            f"fusion {model.settings.fusion} is not LLaVA's to have: several towers are interleaved there"
        )
    inner: Any = model.language_model
    prefix = f"{inner.base_model_prefix}.mm_projector"
    state: Mapping[str, Tensor] = model.projectors.state_dict()
    if has_stock_projector(towers):
        state = model.projectors[0].mlp.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    weights = {f"{prefix}.{name}": tensor.cpu() for name, tensor in state.items()}
    torch.save(weights, folder / "mm_projector.bin")
    write_json(folder / "config.json", llava_config(model))


def llava_config(model: LlavaModel) -> dict[str, Any]:
    """LLaVA's ``config.json``: the language model's, and its settings for vision.

    Raises:
        ValueError: a tower has a setting that its name in LLaVA doesn't hold.
    """
    inner: Any = model.language_model
    text: dict[str, Any] = inner.config.to_dict()
    return text | {
        "model_type": f"llava_{text['model_type']}",
        "mm_vision_tower": tower_names(model.settings.towers),
        "mm_projector_type": PROJECTOR_TYPE,
        "mm_hidden_size": sum(shape.channels for shape in model.shapes),
        "mm_vision_select_layer": -2,  # its towers need it to be there; ours have their own layer
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if model.settings.aspect == "pad" else "square",
        "use_mm_proj": True,
    }


def _write_transformers(model: LlavaModel, folder: Path) -> None:
    if not has_stock_projector(model.settings.towers):
        raise ValueError(
            "transformers' LLaVA has one tower and a projector of two linear layers: export for `llava`"
        )
    mlp: Any = model.projectors[0].mlp
    names = {"0": "linear_1", "2": "linear_2"}
    weights = {
        f"multi_modal_projector.{names[name[0]]}{name[1:]}": tensor.contiguous()
        for name, tensor in mlp.state_dict().items()
    }
    save_file(weights, folder / "mm_projector.safetensors", {"format": "pt"})
