"""k-SAEs of others: read their files, never their code; write the released form.

- *released*, ``final_k_sparse_autoencoder_*.pt``: ``W_enc`` (d n), ``b_enc``, ``W_dec`` (n d), ``b_dec``
- *steerers* and sdxl-unbox, a folder of ``config.json`` and ``state_dict.pth``: ``encoder.weight`` (n d),
  ``latent_bias``, ``decoder.weight`` (d n), ``pre_bias``

- *SAELens* and *sparsify*, folders of ``cfg.json`` and safetensors: :mod:`revelio.sae.io.peers`
- *dictionary_learning*, *Gemma Scope* and *saev*: :mod:`revelio.sae.io.dictionaries`

Those of openai/sparse_autoencoder and of overcomplete are known and refused: they compute something else.

The released code applies no ReLU (mode ``as_code``); steerers and sdxl-unbox do (mode ``fixed``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.inputs import Source
from revelio.sae.io.dictionaries import (
    GEMMA_SCOPE,
    WEIGHTS,
    import_dictionary,
    import_gemma_scope,
    import_saev,
    is_saev,
)
from revelio.sae.io.foreign import (
    check_size,
    filled,
    refuse_in_training_config,
    refuse_settings,
    refuse_tensors,
    take,
    unscaled,
    whole,
)
from revelio.sae.io.peers import import_peer, is_peer
from revelio.sae.kernels.base import Weights
from revelio.sae.metrics import Metrics, evaluate
from revelio.sae.model import PAPER_K, KSparseAutoencoder
from revelio.trust import printable, read_object
from revelio.unpickle import Inert, modules_named, read_tensors

NORMALIZES = (
    "its loader normalizes each row by its own mean and deviation, which Revelio's k-SAEs do not"
)
OVERCOMPLETE = "its encoder is a network of its own with a batch normalization, saved as code"
_STEERERS = ("n_dirs_local", "d_model", "k", "auxk", "dead_steps_threshold", "auxk_coef")


def import_ksae(path: str | Path, k: int | None = None) -> KSparseAutoencoder:
    """Read a k-SAE of any of these formats.

    Args:
        path: a released ``.pt`` file, or a file or folder of one of the others.
        k: latents kept; None: what the file says.

    Raises:
        ValueError: the file is not there, of no known form, damaged, or unsafe; it says no k and none is
            given; or it has settings or tensors that change the computation to one that Revelio has not.
    """
    path = Path(path)
    if is_peer(path):
        return import_peer(path, k)
    if (path / WEIGHTS).is_file():
        return import_dictionary(path, k)
    if path.suffix == ".npz" or (path / GEMMA_SCOPE).is_file():
        return import_gemma_scope(path, k)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{printable(path)} holds no config.json or cfg.json: it is no folder of a known k-SAE"
            )
        return _import_steerers(path, k)
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{printable(path)} holds weights alone, which do not say what is done with them: give the "
            "folder with its cfg.json (SAELens: sae_weights.safetensors, sparsify: sae.safetensors)"
        )
    return import_saev(path, k) if is_saev(path) else _import_released(path, k)


def check_reconstruction(
    model: KSparseAutoencoder,
    rows: Float[Tensor, "b d"],
    worst_fvu: float = 0.5,
    source: Source = None,
) -> Metrics:
    """Measure an imported k-SAE on activations that it should know.

    Args:
        model: the k-SAE.
        rows: the activations.
        worst_fvu: the share of their variance that it may leave unexplained.
        source: which of its inputs they are of; see :meth:`KSparseAutoencoder.encode`.

    Raises:
        ValueError: it leaves more than ``worst_fvu`` of their variance unexplained: another layer,
            model or scale, or a file read wrongly; or they are of no input of the k-SAE.
    """
    found = evaluate(model, rows.split(1024), source)
    if not found.fvu <= worst_fvu:
        raise ValueError(
            f"the k-SAE leaves {found.fvu:.3f} of the variance unexplained (at most {worst_fvu} "
            "allowed): give activations of the layer, model and scale that it was trained on"
        )
    return found


def export_released(model: KSparseAutoencoder, path: Path) -> None:
    """Write the released form: a dict of plain ``cfg`` and ``state_dict``, no pickled class.

    A normalization is folded into the weights.

    Raises:
        ValueError: the activation is not TopK, the mode rectifies, which nothing in the form says, or several
            stores are normalized.
    """
    if model.activation != "topk":
        raise ValueError(f"the released form has no {model.activation}: export to SAELens instead")
    if model.rectifies:
        raise ValueError(
            f"mode {model.mode} rectifies what it keeps, which the released form does not: export to SAELens "
            "or sparsify instead"
        )
    weights = unscaled(model, "the released form")
    tensors = {
        "W_enc": weights.W_enc.T.contiguous(),
        "b_enc": weights.b_enc,
        "W_dec": weights.W_dec,
        "b_dec": weights.b_dec,
    }
    cfg = {"d_in": model.d, "d_sae": model.n, "k": model.k}
    torch.save({"cfg": cfg, "state_dict": tensors}, path)


def _import_released(path: Path, k: int | None) -> KSparseAutoencoder:
    content = _content(path)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    tensors = take(state, ("W_enc", "b_enc", "W_dec", "b_dec"), path)
    cfg = content.get("cfg")
    fields = cfg.fields if isinstance(cfg, Inert) else cfg if isinstance(cfg, Mapping) else {}
    refuse_in_training_config(path, fields)
    refuse_tensors(path, state or {}, tensors)
    kept = k if k is not None else _k_of(fields)
    if kept is None:
        raise ValueError(
            f"{path} does not say how many latents it keeps: pass k (released ones: {PAPER_K})"
        )
    n, d = tensors["W_dec"].shape if tensors["W_dec"].ndim == 2 else (0, 0)
    check_size(path, fields, d_in=d, d_sae=n)
    weights = Weights(tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"], tensors["b_dec"])
    return filled(path, {"k": kept, "mode": "as_code"}, weights)


def _content(path: Path) -> Any:
    """What a ``.pt`` file holds, where it is none of the forms that are known not to fit."""
    try:
        content = read_tensors(path)
    except ValueError:
        if "overcomplete" in modules_named(path):
            raise _other(path, "overcomplete", OVERCOMPLETE) from None
        raise
    state = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    if isinstance(state, Mapping) and "dictionary._weights" in state:
        raise _other(path, "overcomplete", OVERCOMPLETE)
    if isinstance(state, Mapping) and {"latent_bias", "pre_bias", "activation"} <= set(state):
        topk = state["activation"] == "TopK"
        raise _other(
            path, "openai/sparse_autoencoder", NORMALIZES if topk else "it keeps no k latents"
        )
    return content


def _other(path: Path, name: str, why: str) -> ValueError:
    return ValueError(f"{printable(path)} is a k-SAE of {name}, which is not read: {why}")


def _import_steerers(folder: Path, k: int | None) -> KSparseAutoencoder:
    config = read_object(folder / "config.json")
    kept = k if k is not None else whole(config.get("k"))
    if kept is None:
        raise ValueError(f"{folder}/config.json has no whole number `k`: pass k")
    refuse_settings(folder / "config.json", config, _STEERERS)
    content = read_tensors(folder / "state_dict.pth")
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    names = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
    tensors = take(state, names, folder)
    # Counts of how long each latent has been silent; nothing computes with them.
    refuse_tensors(folder, state or {}, (*names, "stats_last_nonzero"))
    n, d = tensors["encoder.weight"].shape if tensors["encoder.weight"].ndim == 2 else (0, 0)
    check_size(folder, config, n_dirs_local=n, d_model=d)
    W_enc, b_enc, W_dec, b_dec = (tensors[name] for name in names)
    return filled(folder, {"k": kept, "mode": "fixed"}, Weights(W_enc, b_enc, W_dec.T, b_dec))


def _k_of(fields: Mapping[str, Any]) -> int | None:
    inner = fields.get("activation_fn_kwargs")
    return whole(fields.get("k")) or (whole(inner.get("k")) if isinstance(inner, Mapping) else None)
