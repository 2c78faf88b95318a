"""k-SAEs of SAELens and of sparsify: folders of ``cfg.json`` and safetensors, read and written.

- *SAELens* (``sae_weights.safetensors``): ``W_enc`` (d n), ``b_enc``, ``W_dec`` (n d), ``b_dec``, and for
  JumpReLU ``threshold`` (n). Architectures ``topk`` and ``jumprelu``; BatchTopK is saved there as JumpReLU
  with one threshold, and so it is here.
- *sparsify* (``sae.safetensors``): ``encoder.weight`` (n d), ``encoder.bias``, ``W_dec`` (n d), ``b_dec``.

Both apply a ReLU to what they keep, as mode ``fixed`` does; b_pre is subtracted first.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from revelio.files import write_whole, write_whole_by
from revelio.sae.filled import filled, take
from revelio.sae.model import PAPER_K, KSparseAutoencoder

CONFIG = "cfg.json"
SAELENS, SPARSIFY = "sae_weights.safetensors", "sae.safetensors"
# The first version with this form of cfg.json.
SAELENS_VERSION = "6.0.0"


def is_peer(folder: Path) -> bool:
    """Whether the folder is of SAELens's or of sparsify's form."""
    return (folder / CONFIG).is_file()


def import_peer(folder: Path, k: int | None = None) -> KSparseAutoencoder:
    """Read a folder of SAELens or sparsify; see :func:`revelio.sae.convert.import_ksae`.

    Raises:
        ValueError: files are missing or damaged, or the k-SAE does something that Revelio's do not.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} needs a readable {CONFIG}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/{CONFIG} holds no settings")
    if (folder / SPARSIFY).is_file():
        return _from_sparsify(folder, config, k)
    return _from_saelens(folder, config, k)


def export_saelens(model: KSparseAutoencoder, folder: Path) -> None:
    """Write a folder that ``SAE.load_from_disk`` of SAELens reads.

    Raises:
        ValueError: the mode keeps negative values.
    """
    _check_rectifies(model, "SAELens")
    tensors = {
        "W_enc": model.W_enc.data.T,
        "b_enc": model.b_enc.data,
        "W_dec": model.W_dec.data,
        "b_dec": model.b_dec.data,
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
        ValueError: the mode keeps negative values, or the activation is not TopK.
    """
    _check_rectifies(model, "sparsify")
    if model.activation != "topk":
        raise ValueError(f"sparsify has no {model.activation}: export to SAELens instead")
    tensors = {
        "encoder.weight": model.W_enc.data,
        "encoder.bias": model.b_enc.data,
        "W_dec": model.W_dec.data,
        "b_dec": model.b_dec.data,
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(model.n // model.d, 1),
        "normalize_decoder": True,
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
    try:
        return take(load_file(folder / name), wanted, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}/{name} cannot be read: {error}") from error


def _from_sparsify(folder: Path, config: dict[str, Any], k: int | None) -> KSparseAutoencoder:
    for name in ("transcode", "skip_connection"):
        if config.get(name):
            raise ValueError(f"{folder} has {name}: it is no autoencoder, and not read")
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{folder} has activation {config['activation']}: only topk is read")
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    tensors = _read(folder, SPARSIFY, names)
    parts = [tensors[name] for name in names]
    return filled(folder, {"k": k or _whole(config, "k", folder), "mode": "fixed"}, *parts)


def _from_saelens(folder: Path, config: dict[str, Any], k: int | None) -> KSparseAutoencoder:
    architecture = config.get("architecture")
    if architecture not in ("topk", "jumprelu"):
        raise ValueError(f"{folder} has architecture {architecture!r}: topk and jumprelu are read")
    for name in ("normalize_activations", "reshape_activations"):
        if config.get(name, "none") not in ("none", None):
            raise ValueError(f"{folder} has {name} {config[name]!r}: fold it in with SAELens first")
    thresholds = ("threshold",) if architecture == "jumprelu" else ()
    tensors = _read(folder, SAELENS, ("W_enc", "b_enc", "W_dec", "b_dec", *thresholds))
    W_enc, b_enc, W_dec = tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"]
    if config.get("rescale_acts_by_decoder_norm"):
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    if not config.get("apply_b_dec_to_input", True):
        b_enc = b_enc + W_enc @ tensors["b_dec"]
    if architecture == "topk":
        settings = {"k": k or _whole(config, "k", folder), "mode": "fixed"}
        return filled(folder, settings, W_enc, b_enc, W_dec, tensors["b_dec"])
    settings = {"k": min(k or PAPER_K, len(b_enc)), "mode": "fixed", "activation": "jumprelu"}
    model = filled(folder, settings, W_enc, b_enc, W_dec, tensors["b_dec"])
    assert model.threshold is not None
    # Its ReLU comes first, so a threshold below 0 is one of 0.
    model.threshold.copy_(tensors["threshold"].clamp(min=0))
    return model


def _whole(config: dict[str, Any], name: str, folder: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int):
        raise ValueError(f"{folder}/{CONFIG} has no whole number `{name}`: pass {name}")
    return value
