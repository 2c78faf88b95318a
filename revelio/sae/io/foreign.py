"""Others' k-SAEs: their tensors, checked, in one of ours; their settings, known or refused by name.

A folder's config has a fixed form, so a setting that is not of that form is refused unless it is off. A
released ``.pt`` carries its whole training config, of which only names that speak of the computation matter.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.kernels.base import Weights
from revelio.sae.model import PAPER_K, KSparseAutoencoder
from revelio.trust import printable
from revelio.unpickle import Name
from revelio.wording import plural

# What these say about the code is what a TopK k-SAE does.
_ACTIVATIONS = ("activation", "activation_fn", "activation_fn_str", "architecture", "sae_type")
# Names in a training config that speak of the computation, and some that only seem to.
_COMPUTES = re.compile(
    r"norm|standardi[sz]|whiten|scal(e|ing)|transcod|skip|gated|batch_?top|sample_?top|signed|relu|reshape"
    r"|error_term|(^|_)tied|center|centre"
)
_TRAINS = re.compile(
    r"decoder|w_dec|grad|loss|mse|noise|init|(^|_)(lr|amp|log)(_|$)|learning|wandb|ghost|aux|sched|dataset"
    r"|image|transform|pixel|skip_(first|batch)"
)
_INPUTS = re.compile(r"act|input")


def is_off(value: Any) -> bool:
    """Whether a setting's value says that nothing is done."""
    return value is None or value is False or value in ("", "none", "None") or value in ([], {}, ())


def refuse_settings(path: Path, settings: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse whatever is on and not known.

    Raises:
        ValueError: see above; the message names the setting.
    """
    for name, value in settings.items():
        if name not in known and not is_off(value):
            raise _refused(path, name, value)


def refuse_in_training_config(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings of a released config that change what a TopK k-SAE computes.

    Raises:
        ValueError: another activation, or a scale, norm or the like; the message names the setting.
    """
    for name, held in settings.items():
        value = held[0] if isinstance(held, tuple) and len(held) == 1 else held
        low = str(name).lower()
        if low in _ACTIVATIONS:
            word = value.name if isinstance(value, Name) else value
            topk = isinstance(word, str) and re.sub("[^a-z]", "", word.lower()) == "topk"
            # `standard` says that there is no gate.
            if not is_off(value) and not topk and (low, word) != ("architecture", "standard"):
                raise _refused(path, name, value)
        elif low == "apply_b_dec_to_input":
            if value is False:
                raise _refused(path, name, value)
        elif low == "activation_fn_kwargs":
            if not is_off(value) and (not isinstance(value, Mapping) or set(value) - {"k"}):
                raise _refused(path, name, value)
        elif _COMPUTES.search(low) and (_INPUTS.search(low) or not _TRAINS.search(low)):
            one = isinstance(value, int | float) and not isinstance(value, bool) and value == 1
            if not (is_off(value) or one):
                raise _refused(path, name, value)


def refuse_tensors(path: Path, state: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse tensors that the computation may need and Revelio would leave out.

    Raises:
        ValueError: there are such; the message names them.
    """
    more = [printable(name) for name, held in state.items()
            if isinstance(held, Tensor) and name not in known]  # fmt: skip
    if more:
        raise ValueError(
            f"{printable(path)} has further tensors ({', '.join(sorted(more)[:5])}): it computes something "
            "that Revelio's k-SAEs do not"
        )


def check_size(path: Path, settings: Mapping[str, Any], **sizes: int) -> None:
    """Compare the sizes that a config gives with those of the tensors.

    Raises:
        ValueError: they differ.
    """
    for name, size in sizes.items():
        said = settings.get(name)
        if isinstance(said, int) and not isinstance(said, bool) and said and said != size:
            raise ValueError(f"{printable(path)}: {name} is {said}, but the tensors have {size}")


def whole(value: Any) -> int | None:
    """A positive whole number, or the one in a tuple of one, or None.

    A trailing comma in the released config turns numbers into one-element tuples (SPEC 5, K10).
    """
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    return value if type(value) is int and value > 0 else None


def _refused(path: Path, name: object, value: Any) -> ValueError:
    plain = isinstance(value, str | int | float | Name)
    shown = printable(value if plain else type(value).__name__)[:80]
    return ValueError(
        f"{printable(path)} has {printable(name)[:80]} = {shown}, which Revelio does not do: import it only "
        "if that changes nothing, with the setting taken out"
    )


def take(state: Any, names: tuple[str, ...], path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, in float32.

    Raises:
        ValueError: some are missing, or are not floating-point numbers.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds no state_dict: is it a k-SAE?")
    held = {name: state.get(name) for name in names}
    wrong = [
        name for name, t in held.items() if not isinstance(t, Tensor) or not t.is_floating_point()
    ]
    if wrong:
        raise ValueError(f"{path} lacks {', '.join(wrong)}: is it a k-SAE of this format?")
    return {name: state[name].float() for name in names}


@torch.no_grad()
def filled(path: Path, settings: Mapping[str, Any], weights: Weights) -> KSparseAutoencoder:
    """A k-SAE with these weights.

    Args:
        path: what they are from, for messages and provenance.
        settings: further arguments of :class:`KSparseAutoencoder`.
        weights: encoder and decoder with a latent a row; b_dec is b_pre. They are copied.

    Raises:
        ValueError: shapes do not match, or weights are not finite.
    """
    W_enc, b_enc = weights.W_enc, weights.b_enc
    W_dec, b_dec = weights.W_dec, weights.b_dec
    if W_enc.ndim != 2 or W_enc.shape != W_dec.shape:
        raise ValueError(
            f"{path}: encoder {tuple(W_enc.shape)} and decoder {tuple(W_dec.shape)} do not match"
        )
    n, d = W_enc.shape
    if b_enc.shape != (n,) or b_dec.shape != (d,):
        raise ValueError(f"{path}: biases {tuple(b_enc.shape)}, {tuple(b_dec.shape)} do not match")
    if not all(bool(part.isfinite().all()) for part in (W_enc, b_enc, W_dec, b_dec)):
        raise ValueError(f"{path} holds NaN or infinity: the file is damaged")
    model = KSparseAutoencoder(d, n, trained_on={"imported_from": path.name}, seed=None, **settings)
    model.W_enc.copy_(W_enc)
    model.b_enc.copy_(b_enc)
    model.W_dec.copy_(W_dec)
    model.b_dec.copy_(b_dec)
    return model.eval()


def jumping(
    path: Path, k: int | None, threshold: Float[Tensor, " n"], weights: Weights
) -> KSparseAutoencoder:
    """A JumpReLU k-SAE with these weights and thresholds; ``k`` is what it counts as, where it says none.

    Raises:
        ValueError: see :func:`filled`; or there is not one threshold a latent.
    """
    latents = weights.b_enc.shape
    settings = {"k": min(k or PAPER_K, latents.numel()), "mode": "fixed", "activation": "jumprelu"}
    model = filled(path, settings, weights)
    assert model.threshold is not None
    if threshold.shape != latents or not bool(threshold.isfinite().all()):
        raise ValueError(
            f"{printable(path)}: thresholds do not match the encoder, or are not finite"
        )
    # Its ReLU comes first, so a threshold below 0 is one of 0.
    model.threshold.copy_(threshold.clamp(min=0))
    return model


def unscaled(model: KSparseAutoencoder, form: str) -> Weights:
    """The weights that do on activations as they are what the k-SAE does on normalized ones.

    Others' files have no place for a normalization, so it goes into the weights, with the same codes: of
    ``(x - shift) / scale``

        W_enc' = W_enc / scale      W_dec' = scale W_dec      b_dec' = scale b_dec + shift

    Args:
        model: the k-SAE; not changed.
        form: what is written, for the message.

    Raises:
        ValueError: it normalizes several stores, each in its own way.
    """
    weights = model.weights
    ways = {(one.kind, one.shift, one.scale) for one in model.inputs}
    if all(kind == "none" for kind, _, _ in ways):
        return weights
    if len(ways) > 1:
        raise ValueError(
            f"the k-SAE normalizes {plural(len(model.inputs), 'store')}, each in its own way, which {form} "
            "has no place for: keep Revelio's form, or train on one store"
        )
    ((_, shift, scaling),) = ways
    scale = weights.b_dec.new_tensor(scaling)
    b_dec = scale * weights.b_dec + (weights.b_dec.new_tensor(shift) if shift else 0)
    return Weights(weights.W_enc / scale, weights.b_enc, weights.W_dec * scale, b_dec)
