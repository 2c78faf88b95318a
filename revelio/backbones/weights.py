"""The weights of one part of a model: found, read, and compared with what the part needs.

    weights = read_weights(source, "unet", DIFFUSERS)       # the tensors, by name
    unet = diffusers_part(UNet2DConditionModel, config, weights, torch.float32)

The libraries put random numbers where weights are missing and pass over what they don't know. Here a
missing, an unexpected or a differently shaped tensor is an error that names it, and so is one that holds
NaN. Read are whole files, shards with an index, and half-precision variants, safetensors before pickles;
the latter by :mod:`revelio.unpickle`, which runs nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from revelio.backbones.loading import quiet, reading
from revelio.backbones.source import DENOISERS, Source
from revelio.tensor_files import tensor_headers
from revelio.trust import printable, read_object
from revelio.unpickle import read_tensors as unpickle
from revelio.wording import plural

M = TypeVar("M", bound=nn.Module)

# How the libraries call a part's weights: as safetensors, and as a pickle.
DIFFUSERS = ("diffusion_pytorch_model", "diffusion_pytorch_model")
TRANSFORMERS = ("model", "pytorch_model")
VARIANTS = ("", ".fp16", ".bf16")
# Constants that old versions of transformers wrote among the weights.
HARMLESS = r"(.*\.)?(position_ids|rotary_emb\.inv_freq)"
MOST_NAMES = 3


@dataclass(frozen=True)
class Weights:
    """What a part's files hold.

    Attributes:
        where: the file, or the index of its shards, with the model's name; for messages.
        tensors: by name.
    """

    where: str
    tensors: dict[str, Tensor]


def read_weights(source: Source, part: str, stems: tuple[str, str]) -> Weights:
    """All weights of one part; of a denoiser, those of the file that the source has in its place, if any.

    Args:
        source: the model.
        part: its subfolder; "" for the model's own folder.
        stems: what the files are called, as safetensors and as a pickle.

    Raises:
        ValueError: there is no such file, or one is damaged, lacks a shard or holds NaN.
    """
    if part in DENOISERS and source.denoiser is not None and source.denoiser.is_file():
        return read_file(source.denoiser)
    for name in _candidates(stems):
        path = f"{part}/{name}" if part else name
        file = source.file(path)
        if file is None:
            continue
        where = f"{path} of {source.name}"
        tensors = _sharded(source, path, file) if name.endswith(".json") else _one_file(file)
        return Weights(where, _plain_names(tensors, where))
    raise ValueError(
        f"{source.name} has no weights{f' in {part}' if part else ''}: it needs "
        f"{stems[0]}.safetensors, its shards with their index, or a .fp16 variant"
    )


def held_tensors(
    source: Source, part: str, stem: str
) -> dict[str, tuple[Path, tuple[int, ...]]] | None:
    """File and shape of each tensor of a part's safetensors files; None where it has no such files.

    Raises:
        ValueError: a file or the index of its shards is damaged, or lacks a shard.
    """
    folder = f"{part}/" if part else ""
    whole = source.file(f"{folder}{stem}.safetensors")
    if whole is not None:
        files = [whole]
    else:
        index = source.file(f"{folder}{stem}.safetensors.index.json")
        if index is None:
            return None
        path = f"{folder}{stem}.safetensors.index.json"
        files = [file for _, file, _ in _shards(source, path, index)]
    return {
        name: (file, header.shape)
        for file in files
        for name, header in tensor_headers(file)[0].items()
    }


def read_file(path: Path) -> Weights:
    """All weights of one ``.safetensors``, ``.bin``, ``.pt`` or ``.ckpt`` file.

    Raises:
        ValueError: it is missing or damaged, or holds NaN.
    """
    return Weights(path.name, _plain_names(_one_file(path), path.name))


def _candidates(stems: tuple[str, str]) -> Iterator[str]:
    """The file names that a part's weights may have, the likeliest first."""
    for stem, ending in zip(stems, (".safetensors", ".bin"), strict=True):
        for variant in VARIANTS:
            yield f"{stem}{variant}{ending}"
            yield f"{stem}{ending}.index{variant}.json"
            if variant:
                yield f"{stem}{variant}{ending}.index.json"


def _one_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        tensor_headers(file)
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{printable(file)} can't be read: {error}") from error
    state = unpickle(file)
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping):
        raise ValueError(f"{printable(file)} holds no weights by name")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _sharded(source: Source, path: str, index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index lists; each must be in the shard it is said to be in."""
    tensors: dict[str, Tensor] = {}
    for name, file, listed in _shards(source, path, index):
        found = _one_file(file)
        _raise_if_odd(f"{name} of {source.name}", listed - found.keys(), found.keys() - listed)
        tensors |= found
    return tensors


def _shards(source: Source, path: str, index: Path) -> Iterator[tuple[str, Path, set[str]]]:
    """The shards that an index lists: their names, their files, and the tensors each is said to hold."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(each, str) for each in shards.values()):
        raise ValueError(f"{path} of {source.name} has no `weight_map` from names to files")
    folder = path.rpartition("/")[0]
    for name in dict.fromkeys(shards.values()):
        if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", name):
            raise ValueError(f"{path} of {source.name} names {printable(repr(name))} as a shard")
        file = source.file(f"{folder}/{name}" if folder else name)
        if file is None:
            raise ValueError(f"{source.name} lacks {name}, which {path} lists")
        yield name, file, {key for key, shard in shards.items() if shard == name}


def _plain_names(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors without the marks that torch.compile and data parallelism leave in names; all finite."""
    named = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    if named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): tensor for name, tensor in named.items()}
    for name, tensor in named.items():
        check_finite(where, name, tensor)
    return named


def check_finite(where: str, name: str, tensor: Tensor) -> None:
    """Raise a ValueError if a weight holds NaN or infinity."""
    # A sum in double precision is NaN or infinite exactly where a number is: one pass, no copy.
    if tensor.is_floating_point() and not bool(tensor.sum(dtype=torch.float64).isfinite()):
        raise ValueError(f"{where}: `{printable(name)}` holds NaN or infinity")


def check_fit(
    where: str,
    wanted: Mapping[str, Sequence[int]],
    found: Mapping[str, Sequence[int]],
) -> None:
    """Compare names and shapes of weights.

    Args:
        where: the file, for messages.
        wanted: the model's shapes, by name.
        found: the file's.

    Raises:
        ValueError: some are missing, unexpected or of another shape; the first of each are named.
    """
    unexpected = {name for name in found.keys() - wanted.keys() if not re.fullmatch(HARMLESS, name)}
    shapes = [
        f"{name} of shape {tuple(found[name])} where {tuple(wanted[name])} is needed"
        for name in sorted(wanted.keys() & found.keys())
        if tuple(wanted[name]) != tuple(found[name])
    ]
    _raise_if_odd(where, wanted.keys() - found.keys(), unexpected, shapes)


def _raise_if_odd(where: str, missing: Any, unexpected: Any, shapes: Sequence[str] = ()) -> None:
    kinds = (("lacks", missing), ("has unexpected", unexpected), ("has", shapes))
    odd = [f"{verb} {_some(sorted(names))}" for verb, names in kinds if names]
    if odd:
        raise ValueError(
            f"{where} {' and '.join(odd)}: these weights belong to another model or are not complete"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:MOST_NAMES])
    return shown + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def diffusers_part(
    kind: type[M], config: Mapping[str, Any], weights: Weights, dtype: torch.dtype
) -> M:
    """A diffusers model of a config and its weights.

    Raises:
        ValueError: the config makes no model, or the weights are not exactly the model's.
    """
    built: Any = kind
    with reading(f"the config beside {weights.where}"), init_empty_weights():
        model: Any = built.from_config(dict(config))
    state = dict(weights.tensors)
    # Attention of VAEs had other names before diffusers 0.17.
    model._fix_state_dict_keys_on_load(state)
    check_fit(weights.where, shapes_of(model.state_dict()), shapes_of(state))
    model.load_state_dict(state, assign=True)
    with quiet():
        return model.to(dtype)


def transformers_part(
    kind: type[M], config: Any, weights: Weights, *, unused: str = "", **settings: Any
) -> M:
    """A transformers model of a config and its weights.

    Args:
        kind: its class.
        config: an object of its config's class.
        weights: of its own or of an older version's names.
        unused: names of other parts in the same file, as a regular expression.
        settings: ``dtype``, ``attn_implementation``.

    Raises:
        ValueError: the config makes no model, or the weights are not exactly the model's.
    """
    import transformers

    built: Any = kind
    if "dtype" in settings and transformers.__version__ < "4.56":  # for LLaVA's own training
        settings["torch_dtype"] = settings.pop("dtype")
    # Not accelerate's way, which makes each weight before it drops it.
    with reading(weights.where), torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in built(config).parameters())
    check_count(weights.where, wanted, sum(t.numel() for t in weights.tensors.values()))
    with reading(weights.where):
        model, report = built.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights.tensors),
            ignore_mismatched_sizes=True,  # to have them reported
            output_loading_info=True,
            **settings,
        )
    check_report(weights.where, report, unused)
    return model


def check_count(where: str, wanted: int, held: int) -> None:
    """Raise unless a model has about as many parameters as its files hold numbers.

    What is missing would be allocated before it is reported.

    Raises:
        ValueError: it wants far more.
    """
    if wanted > 2 * held + 10**8:
        raise ValueError(
            f"{where} holds {plural(held, 'number')}, the config beside it wants {wanted:,}: they belong "
            "to different models"
        )


def check_report(where: str, report: Mapping[str, Any], unused: str = "") -> None:
    """Raise unless transformers' loading report says that every weight was there and used.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    allowed = f"({HARMLESS})|({unused})" if unused else HARMLESS
    unexpected = [name for name in report["unexpected_keys"] if not re.fullmatch(allowed, name)]
    shapes = [
        f"{name} of shape {tuple(found)} where {tuple(wanted)} is needed"
        for name, found, wanted in report["mismatched_keys"]
    ]
    _raise_if_odd(where, report["missing_keys"], unexpected, shapes)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
