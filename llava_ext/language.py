"""The language model and its tokenizer, from a folder, a hub id, or a package; and the whole model.

Any ``AutoModelForCausalLM``: MPT (the paper's MPT-7B-Chat is 4096 wide) by transformers' own class, Llama
and its relatives, ... Padding is the tokenizer's own pad token, else its unknown token (as in the released
code, SPEC 3.4), else the end-of-text token; padding is masked, so the choice changes no result.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_ext.config import ModelConfig
from llava_ext.deepspeed import load_partitioned, shareable
from llava_ext.model import LlavaModel
from llava_ext.model_config import TowerShape
from llava_ext.templates import check_template
from llava_ext.towers import Tower, plain_transforms
from revelio.backbones.loading import dtype_of, reading
from revelio.backbones.packaged import PACKAGED, packaged_path
from revelio.backbones.source import Source
from revelio.backbones.weights import (
    TRANSFORMERS,
    check_count,
    check_finite,
    check_report,
    held_tensors,
    read_weights,
    transformers_part,
)
from revelio.device_memory import release, room, too_large
from revelio.distributed import device_of, own_device
from revelio.hub import is_hub_id
from revelio.tensor_files import tensor_headers
from revelio.wording import plural

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Where the configs of transformers' models say how long a text may be.
LENGTH_KEYS = ("max_seq_len", "max_position_embeddings", "n_positions")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that hold a tokenizer's words, in one form or another.
WORDS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
# Hub ids that configs and papers name and whose owners have withdrawn them.
WITHDRAWN = {
    "mosaicml/mpt-7b-chat": "give the folder of a copy that you have, or another language model "
    "(`lmsys/vicuna-7b-v1.5` with template vicuna_v1, `Qwen/Qwen2.5-7B-Instruct` with template tokenizer)"
}
PACKED = 16  # the most weights that one number of a quantised file holds
FILLED = 0.9  # the least share of the embedding's rows that a tokenizer fills (Phi-2: 0.98)


def build_model(
    config: ModelConfig,
    towers: Sequence[Tower],
    *,
    seed: int = 0,
    zero: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[LlavaModel, "PreTrainedTokenizerBase"]:
    """New projectors on a pretrained language model.

    Args:
        config: of the model.
        towers: only the shapes of their grids are used.
        seed: of the projectors' first weights.
        zero: DeepSpeed's config; under its ZeRO-3 each process loads its share of the language model.
        settings: of :func:`load_language_model`.

    Raises:
        KeyError: an unknown packaged model.
        ValueError: the language model can't be loaded, or a setting doesn't fit it.
    """
    name, revision = config.language_model, config.revision
    settings |= {"revision": revision, "dtype": config.dtype, "zero": zero}
    language_model = load_language_model(name, **settings)
    tokenizer = load_tokenizer(name, revision)
    shapes = [TowerShape(tower.channels, tower.grid) for tower in towers]
    model = assemble(config, language_model, tokenizer, shapes, seed=seed)
    model.config.transforms = plain_transforms(towers)
    return model, tokenizer


def assemble(
    config: ModelConfig,
    language_model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    shapes: Sequence[TowerShape],
    *,
    seed: int = 0,
) -> LlavaModel:
    """New projectors on a language model that is loaded; checks that everything fits.

    Raises:
        ValueError: the template, the length or a budget doesn't fit.
    """
    check_words(tokenizer, language_model, config.language_model)
    check_template(config.template, tokenizer)
    limit = context_length(language_model.config)
    if limit is not None and config.max_length > limit:
        raise ValueError(
            f"`max_length` {config.max_length} is beyond what {config.language_model} takes: "
            f"set `max_length: {limit}` or less"
        )
    model = LlavaModel(config, language_model, shapes, seed=seed)
    # Beyond the vocabulary: no text has it, and the embedding is never asked for it.
    model.config.image_token_id = max(
        len(tokenizer), language_model.config.get_text_config().vocab_size
    )
    if model.image_tokens >= config.max_length:
        raise ValueError(
            f"an image takes {plural(model.image_tokens, 'token')}, which leaves none of `max_length` "
            f"{config.max_length} for text: lower the towers' `budget`"
        )
    return model


def load_language_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    zero: Mapping[str, Any] | None = None,
    **settings: Any,
) -> "PreTrainedModel":
    """A causal language model.

    Args:
        name: a folder, a hub id, or a packaged model's name.
        revision: of a hub id.
        dtype: ``float32``, ``bfloat16`` or ``float16``; under ZeRO-3 it is what DeepSpeed's config says.
        zero: DeepSpeed's config, for which the model is loaded.
        settings: of transformers' ``from_pretrained``: ``device_map``, ``quantization_config``,
            ``attn_implementation``, ...

    Raises:
        ValueError: there is none, it is not prepared, or it is no causal language model.
    """
    source = Source(name, find_language_model(name), revision)
    file = _check_files(source)
    empty = _described(source)
    held = held_tensors(source, "", TRANSFORMERS[0])
    if held is None:
        if settings:
            raise ValueError(f"{name} has no safetensors, which `{next(iter(settings))}` needs")
        return _of_pickles(source, empty, dtype)
    packed = PACKED if getattr(empty.config, "quantization_config", None) is not None else 1
    numbers = sum(prod(shape) for _, shape in held.values())
    wanted = sum(parameter.numel() for parameter in empty.parameters())
    check_count(file, wanted, numbers * packed)
    files = shareable(empty, held, zero or {})
    if files is not None and zero is not None:
        model = _with_generation(load_partitioned(empty, files, zero), source)
    else:
        model = _of_transformers(source, file, dtype, settings)
    _own_outputs(model)
    return model


def _of_transformers(
    source: Source, file: str, dtype: str, settings: Mapping[str, Any]
) -> "PreTrainedModel":
    """The model as transformers loads it; a ValueError names what is missing, unexpected or not finite."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    try:
        with reading(f"{source.name} as a causal language model"):
            model, report = loader.from_pretrained(
                source.location,
                revision=source.revision or "main",
                dtype=dtype_of(dtype),
                trust_remote_code=False,  # by default it would ask, and run what came with the weights
                ignore_mismatched_sizes=True,  # to have them reported
                output_loading_info=True,
                **settings,
            )
    except torch.OutOfMemoryError as error:  # of the device that a quantised one is made on
        release(error)
        advice = "set load_in to 4bit, take a smaller language model"
        raise too_large(source.name, None, room(device_of(own_device())), advice) from error
    check_report(file, report)
    for key, tensor in model.state_dict().items():
        if type(tensor) is Tensor:  # quantised ones are of types that can't all be summed
            check_finite(file, key, tensor)
    return model


def _own_outputs(model: "PreTrainedModel") -> None:
    """What a pass gives back is asked for where it is run, whatever a config says.

    Answers are made with a cache: MPT's config says without.
    """
    model.config.output_hidden_states = model.config.output_attentions = False
    generation: Any = model.generation_config
    generation.output_hidden_states = generation.output_attentions = None
    generation.use_cache = True


def _described(source: Source) -> "PreTrainedModel":
    """The model without weights: nothing is allocated.

    Raises:
        ValueError: it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with reading(f"{source.name} as a causal language model"), torch.device("meta"):
            config = AutoConfig.from_pretrained(
                source.location, revision=source.revision or "main", trust_remote_code=False
            )
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        if source.name not in WITHDRAWN:
            raise
        said = f"{source.name} was withdrawn from the hub: {WITHDRAWN[source.name]}"
        raise ValueError(said) from error


def _of_pickles(source: Source, empty: "PreTrainedModel", dtype: str) -> "PreTrainedModel":
    """The model of ``pytorch_model*.bin`` files, read without running anything in them.

    Raises:
        ValueError: there are none, or they are damaged or another model's.
    """
    try:
        weights = read_weights(source, "", TRANSFORMERS)
    except ValueError as error:
        raise ValueError(
            f"{error} (where these files are good, save the model again as safetensors: "
            "`model.save_pretrained(FOLDER)` in transformers)"
        ) from error
    model = transformers_part(type(empty), empty.config, weights, dtype=dtype_of(dtype))
    return _with_generation(model, source)


def _with_generation(model: "PreTrainedModel", source: Source) -> "PreTrainedModel":
    """A model with the generation config that its files bring, if any."""
    from transformers import GenerationConfig

    if source.file(GENERATION) is not None:
        with reading(f"{GENERATION} of {source.name}"):
            model.generation_config = GenerationConfig.from_pretrained(
                source.location, revision=source.revision or "main"
            )
    _own_outputs(model)
    return model


def _check_files(source: Source) -> str:
    """The weights' file for messages; what of it lies here is checked against its size.

    Raises:
        ValueError: the config or a file is damaged.
    """
    folder = source.folder
    if folder is None:
        return source.name
    config = source.find_json("config.json")
    if config is None:
        raise ValueError(
            f"{source.name} can't be loaded as a causal language model (it has no config.json): "
            "give a folder, a hub id or a packaged name"
        )
    source.check("config.json", config, {})
    # Where answers end; without the file it is what config.json says.
    generation = source.find_json(GENERATION)
    known = generation and ("transformers_version" in generation or "eos_token_id" in generation)
    if generation is not None and (not known or "model_type" in generation):
        raise ValueError(f"{GENERATION} of {source.name} is empty, or no such config")
    source.check(GENERATION, generation or {}, {})
    for file in sorted(folder.glob("*.safetensors")):
        tensor_headers(file)
    names = (name for name in WEIGHTS if (folder / name).is_file())
    return f"{next(names, 'the weights')} of {source.name}"


def load_tokenizer(name: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """A language model's tokenizer, with a pad token.

    Raises:
        ValueError: there is none, or it has no token to pad with.
    """
    from transformers import AutoTokenizer

    where = find_language_model(name)
    source = Source(name, where, revision)
    # transformers makes an empty tokenizer where the words are missing, and takes other special tokens
    # where the config is.
    if source.file(TOKENIZER_CONFIG) is None or not any(map(source.file, WORDS)):
        raise ValueError(
            f"{name} has no whole tokenizer: it needs {TOKENIZER_CONFIG}, and {', '.join(WORDS[:3])} "
            "or another file of words"
        )
    for file in (TOKENIZER_CONFIG, "tokenizer.json"):
        source.find_json(file)
    pieces = source.file("tokenizer.json") is None and source.file("tokenizer.model") is not None
    if pieces and not (find_spec("google") and find_spec("google.protobuf")):
        raise ValueError(
            f"the tokenizer of {name} is a sentencepiece model, which is read by protobuf: "
            "pip install protobuf"
        )
    with reading(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=revision or "main", trust_remote_code=False
        )
    if type(tokenizer.model_max_length) not in (int, float):
        raise ValueError(f"{TOKENIZER_CONFIG} of {name} has no number as model_max_length")
    set_pad_token(tokenizer, name)
    return tokenizer


def set_pad_token(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Give the tokenizer a pad token out of its own tokens, unless it has one.

    Raises:
        ValueError: it has neither an unknown nor an end-of-text token.
    """
    if tokenizer.pad_token is not None:
        return
    token = tokenizer.unk_token or tokenizer.eos_token
    if token is None:
        raise ValueError(
            f"the tokenizer of {name} has no pad, unknown or end-of-text token: "
            "set one of them in its tokenizer_config.json"
        )
    tokenizer.pad_token = token


def check_words(
    tokenizer: "PreTrainedTokenizerBase", language_model: "PreTrainedModel", name: str
) -> None:
    """Refuse a tokenizer of another model, as far as the number of its words tells.

    Embeddings may be padded by a few percent, never filled.

    Raises:
        ValueError: it has more words than the model, or far fewer.
    """
    words, rows = len(tokenizer), language_model.config.get_text_config().vocab_size
    if not FILLED * rows <= words <= rows:
        raise ValueError(
            f"the tokenizer of {name} has {plural(words, 'word')}, the language model {rows}: they belong to "
            "different models"
        )


def find_language_model(name: str) -> str:
    """The folder or hub id behind a name.

    Raises:
        ValueError: neither, or a packaged model that is not prepared.
    """
    if name in PACKAGED:
        return str(packaged_path(name))
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if not is_hub_id(name):
        raise ValueError(
            f"no language model at {name!r}: give a folder, a hub id, or one of {', '.join(PACKAGED)}"
        )
    return name


def context_length(config: "PretrainedConfig") -> int | None:
    """Tokens that a language model takes at most, or None where it doesn't say.

    MPT fails beyond its ``max_seq_len``; others answer worse beyond what they were trained for.
    """
    known = config.get_text_config().to_dict()
    return next((int(known[key]) for key in LENGTH_KEYS if known.get(key)), None)
