"""Low-rank adapters of the language model (peft): put in, folded in, read from files.

The model below them may be quantised (QLoRA, arXiv 2305.14314).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llava_ext.model import LlavaModel, innermost
from llava_ext.stages import LoadIn, LoraOptions
from revelio.backbones.loading import reading
from revelio.backbones.weights import check_fit, shapes_of
from revelio.seeds import key_seed, lent
from revelio.tensor_files import read_tensors, tensor_headers
from revelio.trust import printable, read_object

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import Tensor

LORA_TARGETS = "all-linear"
# Settings of an adapter that may differ from peft's defaults; those that name code are not among them.
LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")
# What peft sets by itself for GPT-2's layers and for those of mixtures of experts.
LORA_SETTINGS += ("fan_in_fan_out", "target_parameters", "rank_pattern", "alpha_pattern")
FREE_SETTINGS = (
    *LORA_SETTINGS,
    "task_type",
    "base_model_name_or_path",
    "peft_type",
    "peft_version",
    "inference_mode",
    "revision",
)


def quantised(load_in: LoadIn | None, *, bfloat16: bool, device: str) -> dict[str, Any]:
    """What ``from_pretrained`` takes to load a language model in fewer bits: NF4 (QLoRA's), or LLM.int8.

    peft's ``prepare_model_for_kbit_training`` is not needed: the model is frozen anyway, its norms compute in
    float32 by themselves, and checkpointing is not the reentrant kind that wants a hook. What is left of it,
    embeddings in float32, only costs memory.

    Args:
        load_in: how many bits; None loads it as it is.
        bfloat16: whether the model computes in bfloat16.
        device: where it is to be.
    """
    if load_in is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if load_in == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16 if bfloat16 else torch.float32,
        }
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": device}}


def add_lora(model: LlavaModel, options: LoraOptions, *, seed: int = 0) -> None:
    """Put low-rank adapters (peft) into the language model; then only these and the projectors train.

    Args:
        model: changed in place.
        options: of the adapters.
        seed: of their first weights.

    Raises:
        ValueError: no layer has such a name.
    """
    from peft import LoraConfig

    targets = list(options.targets)
    layers = [name for name, _ in model.language_model.named_modules()]
    for target in targets:
        # As peft looks for it; where others are found, it would pass over this one.
        found = any(name == target or name.endswith(f".{target}") for name in layers)
        if target != LORA_TARGETS and not found:
            raise ValueError(
                f"`lora.targets` names {target}, and no layer of {model.settings.language_model} is called "
                f"so: give the ends of layers' names (q_proj), or {LORA_TARGETS} alone"
            )
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets[0] if targets == [LORA_TARGETS] else targets,
    )
    # peft draws from the global state: put aside, keyed, put back.
    with lent(key_seed(seed, "adapter")):
        model.set_language_model(adapted(model.language_model, settings))


def merge_adapter(model: LlavaModel) -> None:
    """Fold the adapter into the language model's own weights.

    Raises:
        ValueError: the model has none, or is quantised.
    """
    from peft import PeftModel

    wrapped: Any = model.language_model
    if not isinstance(wrapped, PeftModel):
        raise ValueError("the model has no adapter, so there is nothing to fold in")
    if is_quantised(model):
        raise ValueError(
            "the language model is quantised, so an adapter can't be folded in: load the model without "
            "`quantization_config` first"
        )
    model.set_language_model(wrapped.merge_and_unload())
    model.language_changed = True


def adapted(language_model: Any, settings: "LoraConfig") -> "PeftModel":
    """A language model with new adapters in it."""
    from peft import get_peft_model

    # Without a task: peft's wrapper of causal language models takes no embeddings for MPT.
    model = get_peft_model(language_model, settings)
    settings.task_type = "CAUSAL_LM"  # for others that load the adapter
    return model


def load_adapter(language_model: Any, folder: Path) -> "PeftModel":
    """The language model with a saved adapter on top.

    Raises:
        ValueError: it is no adapter that :func:`add_lora` makes, or doesn't fit.
    """
    from peft import LoraConfig, get_peft_model_state_dict
    from peft import set_peft_model_state_dict as set_state

    settings = _check_adapter(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    state = read_weights_file(file)
    with reading(str(folder)):
        chosen = {name: settings[name] for name in LORA_SETTINGS if name in settings}
        model = adapted(language_model, LoraConfig(**chosen))
        wanted: "dict[str, Tensor]" = get_peft_model_state_dict(model)
    check_fit(str(file), shapes_of(wanted), shapes_of(state))
    set_state(model, state)
    return model


def _check_adapter(path: Path) -> dict[str, Any]:
    """The settings of an adapter, none beyond those of :func:`add_lora`: some make peft import modules.

    Raises:
        ValueError: it has others, or is of another kind.
    """
    from peft import LoraConfig

    entries = read_object(path)
    plain = LoraConfig().to_dict()
    for name, value in entries.items():
        if name not in FREE_SETTINGS and value and value != plain.get(name):
            raise ValueError(
                f"{path} sets `{printable(name)}`, which no adapter of llava_ext has: it is not loaded"
            )
    if entries.get("peft_type") != "LORA" or type(entries.get("r")) is not int:
        raise ValueError(f"{path} is no LoRA adapter's config")
    return entries


def read_weights_file(file: Path) -> "dict[str, Tensor]":
    """All weights of a safetensors file of a saved model.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not file.is_file():
        raise ValueError(f"no weights at {file}: give the folder of a saved model")
    headers, _ = tensor_headers(file)
    return read_tensors(file, dict.fromkeys(headers))


def rounded(state: Mapping[str, "Tensor"], dtype: "torch.dtype") -> "dict[str, Tensor]":
    """Weights as they are saved: what trained is float32 until here, and adapters stay so.

    Two names of one weight (tied embeddings) stay one: as two it would be written twice.
    """
    made: dict[tuple[int, ...], Tensor] = {}
    found = dict(state)
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and "lora_" not in name:
            place = (tensor.data_ptr(), *tensor.shape, *tensor.stride())
            if place not in made:
                made[place] = tensor.to(dtype)
            found[name] = made[place]
    return found


def is_quantised(model: LlavaModel) -> bool:
    """Whether the language model's weights are in fewer bits than any number format."""
    return "quantization_config" in cast(Any, innermost(model.language_model)).config.to_dict()
