"""k-SAEs of SAELens and of sparsify: folders of ``cfg.json`` and safetensors, read and written.

- *SAELens* (``sae_weights.safetensors``): ``W_enc`` (d n), ``b_enc``, ``W_dec`` (n d), ``b_dec``, and for
  JumpReLU ``threshold`` (n). Architectures ``topk`` and ``jumprelu``; BatchTopK is saved there as JumpReLU
  with one threshold, and so it is here.
- *sparsify* (``sae.safetensors``): ``encoder.weight`` (n d), ``encoder.bias``, ``W_dec`` (n d), ``b_dec``.

Both apply a ReLU to what they keep, as mode ``fixed`` does; b_pre is subtracted first. A normalization is
folded into the weights that are written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from revelio.files import write_whole, write_whole_by
from revelio.sae.io.foreign import (
    check_size,
    filled,
    is_off,
    jumping,
    refuse_settings,
    take,
    unscaled,
    whole,
)
from revelio.sae.kernels.base import Weights
from revelio.sae.model import KSparseAutoencoder
from revelio.tensor_files import read_tensors
from revelio.trust import read_object

CONFIG = "cfg.json"
SAELENS, SPARSIFY = "sae_weights.safetensors", "sae.safetensors"
# The first version with this form of cfg.json.
SAELENS_VERSION = "6.0.0"
# Settings that are applied, checked here, or of the training alone.
_OF_SPARSIFY = ("activation", "k", "d_in", "num_latents", "expansion_factor", "normalize_decoder")
_OF_SPARSIFY += ("multi_topk",)
_OF_SAELENS = ("architecture", "k", "d_in", "d_sae", "dtype", "device", "metadata")
_OF_SAELENS += ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
_OF_SAELENS += ("activation_fn", "activation_fn_str", "activation_fn_kwargs")
_OF_SAELENS += (
    "model_name",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "hook_name",
    "hook_layer",
)
_OF_SAELENS += (
    "hook_head_index",
    "hook_point",
    "hook_point_layer",
    "hook_point_head_index",
    "prepend_bos",
)
_OF_SAELENS += (
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "dataset_trust_remote_code",
    "release",
)
_OF_SAELENS += ("neuronpedia_id", "sae_lens_version", "sae_lens_training_version")


def is_peer(folder: Path) -> bool:
    """Whether the folder is of SAELens's or of sparsify's form."""
    return (folder / CONFIG).is_file()


def import_peer(folder: Path, k: int | None = None) -> KSparseAutoencoder:
    """Read a folder of SAELens or sparsify; see :func:`revelio.sae.io.released.import_ksae`.

    Raises:
        ValueError: files are missing or damaged, or the k-SAE does something that Revelio's do not.
    """
    config = read_object(folder / CONFIG)
    if (folder / SPARSIFY).is_file():
        return _from_sparsify(folder, config, k)
    return _from_saelens(folder, config, k)


def export_saelens(model: KSparseAutoencoder, folder: Path) -> None:
    """Write a folder that ``SAE.load_from_disk`` of SAELens reads.

    Raises:
        ValueError: the mode keeps negative values, or several stores are normalized.
    """
    _check_rectifies(model, "SAELens")
    weights = unscaled(model, "SAELens")
    tensors = {
        "W_enc": weights.W_enc.T,
        "b_enc": weights.b_enc,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec,
    }
    config: dict[str, Any] = {
        "d_in": model.d,
        "d_sae": model.n,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION},
    }
    if model.threshold is None:
        config |= {"architecture": "topk", "k": model.k, "rescale_acts_by_decoder_norm": False}
    else:
        config["architecture"] = "jumprelu"
        tensors["threshold"] = model.threshold.expand(model.n)
    _write(folder, SAELENS, tensors, config)


def export_sparsify(model: KSparseAutoencoder, folder: Path) -> None:
    """Write a folder that ``SparseCoder.load_from_disk`` of sparsify reads.

    Raises:
        ValueError: the mode keeps negative values, the activation is not TopK, or several stores are
            normalized.
    """
    _check_rectifies(model, "sparsify")
    if model.activation != "topk":
        raise ValueError(f"sparsify has no {model.activation}: export to SAELens instead")
    weights = unscaled(model, "sparsify")
    tensors = {
        "encoder.weight": weights.W_enc,
        "encoder.bias": weights.b_enc,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec,
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(model.n // model.d, 1),
        # Of their training alone. A normalization in the decoder's rows is not to be taken out.
        "normalize_decoder": all(one.kind == "none" for one in model.inputs),
        "num_latents": model.n,
        "k": model.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": model.d,
    }
    _write(folder, SPARSIFY, tensors, config)


def _check_rectifies(model: KSparseAutoencoder, name: str) -> None:
    if not model.rectifies:
        raise ValueError(
            f"mode {model.mode} keeps negative values, which {name} drops: export the released form"
        )


def _write(
    folder: Path, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    held = {key: value.cpu().contiguous() for key, value in tensors.items()}
    write_whole_by(folder / name, lambda path: save_file(held, path))
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _read(folder: Path, name: str, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    return take(read_tensors(folder / name, dict.fromkeys(wanted)), wanted, folder)


def _from_sparsify(folder: Path, config: dict[str, Any], k: int | None) -> KSparseAutoencoder:
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{folder} has activation {config['activation']!r}: only topk is read")
    refuse_settings(folder / CONFIG, config, _OF_SPARSIFY)
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    tensors = _read(folder, SPARSIFY, names)
    weights = Weights(*(tensors[name] for name in names))
    n, d = (*weights.W_enc.shape, 0, 0)[:2]
    check_size(folder / CONFIG, config, d_in=d, num_latents=n)
    return filled(folder, {"k": k or _whole(config, "k", folder), "mode": "fixed"}, weights)


def _from_saelens(folder: Path, config: dict[str, Any], k: int | None) -> KSparseAutoencoder:
    architecture = config.get("architecture")
    if architecture is None:
        raise ValueError(
            f"{folder}/{CONFIG} names no architecture, as those of SAELens's first versions: load the folder "
            "with a newer SAELens and save it again"
        )
    named = {config.get("activation_fn"), config.get("activation_fn_str")} - {None}
    if architecture == "standard" and named == {"topk"}:
        architecture = "topk"  # as versions before 6 wrote it
    if architecture not in ("topk", "jumprelu"):
        raise ValueError(f"{folder} has architecture {architecture!r}: topk and jumprelu are read")
    for name in ("normalize_activations", "reshape_activations"):
        if not is_off(config.get(name)):
            raise ValueError(f"{folder} has {name} {config[name]!r}: fold it in with SAELens first")
    _check_functions(folder / CONFIG, config, architecture)
    refuse_settings(folder / CONFIG, config, _OF_SAELENS)
    thresholds = ("threshold",) if architecture == "jumprelu" else ()
    tensors = _read(folder, SAELENS, ("W_enc", "b_enc", "W_dec", "b_dec", *thresholds))
    if tensors["W_enc"].ndim != 2 or tensors["W_enc"].T.shape != tensors["W_dec"].shape:
        raise ValueError(f"{folder}: encoder and decoder do not match")
    W_enc, b_enc, W_dec = tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"]
    check_size(folder / CONFIG, config, d_in=W_enc.shape[1], d_sae=W_enc.shape[0])
    if b_enc.shape != W_enc.shape[:1] or tensors["b_dec"].shape != W_enc.shape[1:]:
        raise ValueError(f"{folder}: biases do not match the encoder")
    if config.get("rescale_acts_by_decoder_norm"):
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    if config.get("apply_b_dec_to_input", True) is False:
        b_enc = b_enc + W_enc @ tensors["b_dec"]
    weights = Weights(W_enc, b_enc, W_dec, tensors["b_dec"])
    if architecture == "topk":
        settings = {"k": k or _whole(config, "k", folder), "mode": "fixed"}
        return filled(folder, settings, weights)
    return jumping(folder, k, tensors["threshold"], weights)


def _check_functions(path: Path, config: dict[str, Any], architecture: str) -> None:
    """Older versions name a function besides the architecture; it must say the same."""
    meant = "relu" if architecture == "jumprelu" else "topk"
    for name in ("activation_fn", "activation_fn_str"):
        if not is_off(config.get(name)) and config[name] != meant:
            raise ValueError(f"{path} has {name} {config[name]!r} with architecture {architecture}")
    arguments = config.get("activation_fn_kwargs")
    if not is_off(arguments) and (not isinstance(arguments, dict) or set(arguments) - {"k"}):
        raise ValueError(f"{path} has activation_fn_kwargs other than k, which are not read")
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config.get(name, True), bool | None):
            raise ValueError(f"{path}: {name} must be true or false")


def _whole(config: dict[str, Any], name: str, folder: Path) -> int:
    inner = config.get("activation_fn_kwargs")
    value = whole(config.get(name)) or (whole(inner.get(name)) if isinstance(inner, dict) else None)
    if value is None:
        raise ValueError(f"{folder}/{CONFIG} has no whole number `{name}`: pass {name}")
    return value
