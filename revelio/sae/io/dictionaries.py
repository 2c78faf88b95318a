"""k-SAEs of dictionary_learning, Gemma Scope and saev: read where Revelio's compute the same.

- *dictionary_learning*, a folder of ``ae.pt`` and ``config.json``, which names the class. ``AutoEncoderTopK``
  and ``BatchTopKSAE``: ``encoder.weight`` (n d), ``encoder.bias``, ``decoder.weight`` (d n), ``b_dec``.
  ``MatryoshkaBatchTopKSAE`` and ``JumpReluAutoEncoder``: ``W_enc`` (d n), ``b_enc``, ``W_dec`` (n d),
  ``b_dec``.
- *Gemma Scope*, ``params.npz``: ``W_enc`` (d n), ``b_enc``, ``W_dec`` (n d), ``b_dec``, ``threshold`` (n).
- *saev*, a ``.pt`` file behind a line of JSON: the same without thresholds; TopK of its schema 2.

JumpReLUs of the first two, and saev, do not subtract b_dec first: ``W_enc x + b_enc`` is
``W_enc (x - b_dec) + (b_enc + W_enc b_dec)``. saev keeps the k largest as they are, without a ReLU.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revelio.sae.io.foreign import filled, jumping, refuse_settings, refuse_tensors, take, whole
from revelio.sae.kernels.base import Weights
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import kind_of, parse_json, printable, read_object, regular_file
from revelio.unpickle import read_arrays, read_tensors

WEIGHTS = "ae.pt"
GEMMA_SCOPE = "params.npz"
READ = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
HEADER_LIMIT = 1 << 16
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
_MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")
# Settings of saev that are applied, or of the training alone.
_OF_SAEV = (
    "d_vit",
    "exp_factor",
    "n_reinit_samples",
    "remove_parallel_grads",
    "normalize_w_dec",
    "seed",
    "activation",
)


def import_dictionary(folder: Path, k: int | None) -> KSparseAutoencoder:
    """Read a folder of dictionary_learning; see :func:`revelio.sae.io.released.import_ksae`.

    Raises:
        ValueError: files are missing or damaged, or it is of a class that computes something else.
    """
    trainer = read_object(folder / "config.json").get("trainer")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    name = trainer.get("dict_class")
    if name not in READ:
        raise ValueError(
            f"{printable(folder)} is of dictionary_learning's class {printable(name)}: {', '.join(READ)} are "
            "read, others compute something that Revelio's k-SAEs do not"
        )
    content = read_tensors(folder / WEIGHTS)
    if not isinstance(content, Mapping):
        raise ValueError(f"{printable(folder / WEIGHTS)} holds no state_dict: is it a k-SAE?")
    # What was compiled has its names behind this.
    state = {str(key).removeprefix("_orig_mod."): value for key, value in content.items()}
    names = _LINEAR if name in READ[:2] else _MATRICES
    tensors = [_floats(state, one, folder) for one in names]
    refuse_tensors(folder, state, (*names, "k", "threshold", "group_sizes"))
    W_enc, b_enc, W_dec, b_dec = tensors
    W_enc, W_dec = (W_enc, W_dec.T) if names is _LINEAR else (W_enc.T, W_dec)
    if name == "JumpReluAutoEncoder":
        threshold = _floats(state, "threshold", folder)
        b_enc = _shifted(folder, W_enc, b_enc, b_dec)
        return jumping(folder, k, threshold, Weights(W_enc, b_enc, W_dec, b_dec))
    kept = k or _number(state.get("k")) or whole(trainer.get("k"))
    if kept is None:
        raise ValueError(f"{printable(folder)} does not say how many latents it keeps: pass k")
    settings: dict[str, Any] = {"k": kept, "mode": "fixed"}
    weights = Weights(W_enc, b_enc, W_dec, b_dec)
    if name == "AutoEncoderTopK":
        return filled(folder, settings, weights)
    threshold = _floats(state, "threshold", folder)
    if threshold.numel() != 1 or not float(threshold) >= 0:
        raise ValueError(
            f"{printable(folder)} has no threshold yet ({printable(threshold.tolist())}), by which a {name} "
            "is used: its training was too short"
        )
    settings |= {
        "activation": "batch-topk",
        "prefixes": _prefixes(state.get("group_sizes"), folder),
    }
    model = filled(folder, settings, weights)
    assert model.threshold is not None
    model.threshold.fill_(float(threshold))
    return model


def import_gemma_scope(path: Path, k: int | None) -> KSparseAutoencoder:
    """Read a ``params.npz`` of Gemma Scope, or the folder that holds it.

    Raises:
        ValueError: it is damaged, or has other arrays.
    """
    path = path / GEMMA_SCOPE if path.is_dir() else path
    state = read_arrays(path)
    names = (*_MATRICES, "threshold")
    tensors = take(state, names, path)
    refuse_tensors(path, state, names)
    W_enc, b_enc, W_dec, b_dec, threshold = (tensors[name] for name in names)
    b_enc = _shifted(path, W_enc.T, b_enc, b_dec)
    return jumping(path, k, threshold, Weights(W_enc.T, b_enc, W_dec, b_dec))


def is_saev(path: Path) -> bool:
    """Whether a file begins with a line of JSON, as those of saev do."""
    with regular_file(path).open("rb") as file:
        return file.read(1) == b"{"


def import_saev(path: Path, k: int | None) -> KSparseAutoencoder:
    """Read a file of saev.

    Raises:
        ValueError: it is damaged, of another schema than 2, of another activation than TopK, or has settings
            that are not known.
    """
    where = printable(path)
    with path.open("rb") as file:
        line = file.readline(HEADER_LIMIT).decode("utf-8", "replace")
    header = parse_json(line, f"the first line of {where}")
    if (
        not isinstance(header, dict)
        or header.get("schema") != 2
        or not isinstance(header.get("cfg"), dict)
    ):
        raise ValueError(
            f"{where} is a file of saev of another schema than 2, whose versions compute different things: "
            "load it with saev and save it again"
        )
    cfg = header["cfg"]
    activation = cfg.get("activation")
    activation = activation if isinstance(activation, dict) else {}
    if activation.get("cls") != "TopK":
        raise ValueError(
            f"{where} is a k-SAE of saev with the activation {printable(activation.get('cls'))}: TopK is "
            "read, of others its versions differ or Revelio has none"
        )
    refuse_settings(path, cfg, _OF_SAEV)
    parameters = activation.get("params")
    kept = k or whole(parameters.get("top_k") if isinstance(parameters, dict) else None)
    if kept is None:
        raise ValueError(f"{where} does not say how many latents it keeps: pass k")
    state = read_tensors(path)
    tensors = take(state, _MATRICES, path)
    refuse_tensors(path, state, _MATRICES)
    W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in _MATRICES)
    b_enc = _shifted(path, W_enc.T, b_enc, b_dec)
    weights = Weights(W_enc.T, b_enc, W_dec, b_dec)
    return filled(path, {"k": kept, "mode": "as_code"}, weights)


def _shifted(path: Path, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
    """``b_enc + W_enc b_dec``, in double precision, for an encoder (n d) from which nothing is subtracted."""
    if W_enc.ndim != 2 or b_dec.shape != W_enc.shape[1:] or b_enc.shape != W_enc.shape[:1]:
        raise ValueError(f"{printable(path)}: biases do not match the encoder")
    return (b_enc.double() + W_enc.double() @ b_dec.double()).float()


def _floats(state: Mapping[str, Any], name: str, path: Path) -> Tensor:
    return take(state, (name,), path)[name]


def _number(value: Any) -> int | None:
    single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
    return whole(int(value)) if single else whole(value)


def _prefixes(sizes: Any, folder: Path) -> list[int]:
    """Matryoshka's groups of latents as the ends of all but the last."""
    if sizes is None:
        return []
    if not isinstance(sizes, Tensor) or sizes.ndim != 1 or sizes.dtype != torch.int64:
        raise ValueError(f"{printable(folder)}: group_sizes can't be {kind_of(sizes)}")
    return sizes.cumsum(0).tolist()[:-1]
