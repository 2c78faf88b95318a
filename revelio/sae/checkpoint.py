"""Checkpoints of a training run: weights, moments, position. Resumed on a CPU, a run is bit-equal.

A folder of one safetensors file a tensor (so that saving needs no second copy of them all) and
``state.json``, which holds every file's sha256 and its own, so that a flipped bit is not resumed from. Those
of earlier versions have no sums; their shapes and counters are checked all the same. Randomness needs no
place here: rows are ordered by (seed, epoch).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from revelio.sae.model import KSparseAutoencoder
from revelio.sae.state import TrainState
from revelio.tensor_files import check_names, tensor_headers
from revelio.trust import file_in, printable, read_object

FORMAT = 1
DTYPES = {torch.float32: "F32", torch.int64: "I64"}
_COUNTS = ("step", "epoch", "batch", "samples")
_NUMBERS = ("variance", "window_sum")
_COUNTERS = (*_COUNTS, *_NUMBERS, "stopped", "window_best")


class Files(Protocol):
    """How tensors are written and read."""

    def save(self, path: Path | None, tensors: Mapping[str, Tensor]) -> None:
        """Write one file; only the process that has a path writes."""
        ...

    def load(self, path: Path, name: str, into: Tensor) -> None:
        """Fill a tensor from the file that holds it."""
        ...

    def shape(self, name: str, tensor: Tensor) -> Sequence[int]:
        """The shape in the file of a tensor that this process holds, maybe in part."""
        ...


class WholeFiles:
    """This process holds everything."""

    def save(self, path: Path | None, tensors: Mapping[str, Tensor]) -> None:
        """See :class:`Files`."""
        if path is not None:
            save_file({name: held.cpu().contiguous() for name, held in tensors.items()}, path)

    def load(self, path: Path, name: str, into: Tensor) -> None:
        """See :class:`Files`."""
        with safe_open(path, framework="pt") as file:
            into.copy_(file.get_tensor(name))

    def shape(self, name: str, tensor: Tensor) -> Sequence[int]:
        """See :class:`Files`."""
        return tensor.shape


def save_checkpoint(
    folder: Path | None, model: KSparseAutoencoder, state: TrainState, files: Files | None = None
) -> None:
    """Write the model and the training state into an existing, empty folder.

    Args:
        folder: where; None on the processes that only give their part.
        model: what is trained.
        state: where its training stands.
        files: how; None: this process holds everything.
    """
    files = files or WholeFiles()
    sums: dict[str, str] = {}
    for name, tensor in _tensors(model, state).items():
        path = folder and folder / f"{name}.safetensors"
        files.save(path, {name: tensor})
        if path is not None:
            sums[path.name] = _sha256(path)
    if folder is not None:
        state.window_sum = float(state.window_sum)
        content = _header(model) | {name: getattr(state, name) for name in _COUNTERS}
        content["files"] = sums
        content["sha256"] = _sum_of(content)
        (folder / "state.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def checkpoint_bytes(model: KSparseAutoencoder, state: TrainState) -> int:
    """How much room this process's part of a checkpoint takes."""
    return sum(tensor.nbytes for tensor in _tensors(model, state).values())


@torch.no_grad()
def load_checkpoint(
    folder: Path, model: KSparseAutoencoder, files: Files | None = None
) -> TrainState:
    """Fill the model and give the training state that :func:`save_checkpoint` wrote.

    Raises:
        ValueError: the folder is no checkpoint, is damaged, or is of another model; the model may then be
            filled in part.
    """
    header = _read_header(folder, model)
    files = files or WholeFiles()
    state = TrainState.start(model)
    for name, tensor in _tensors(model, state).items():
        path = folder / f"{name}.safetensors"
        try:
            _check_file(folder, name, tensor, files, header.get("files"))
            files.load(path, name, tensor)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise _damaged(folder, path.name, error) from error
    for name in _COUNTERS:
        setattr(state, name, header[name])
    last = state.moments.last
    if not -state.step <= int(last.min()) <= int(last.max()) <= state.step:
        raise _damaged(folder, "last.safetensors", "a latent moved after the last step")
    if not 0 <= int(state.fired_at.min()) <= int(state.fired_at.max()) <= state.samples:
        raise _damaged(folder, "fired_at.safetensors", "a latent fired after the last row")
    return state


def _check_file(
    folder: Path, name: str, tensor: Tensor, files: Files, sums: Mapping[str, str] | None
) -> None:
    """Refuse a file that is not the one saved, or whose tensor is not of the right shape and type."""
    path = file_in(folder, f"{name}.safetensors")
    headers, _ = tensor_headers(path)
    check_names(path, headers, {name: tensor})
    found, wanted = headers[name], tuple(files.shape(name, tensor))
    if (found.shape, found.dtype) != (wanted, DTYPES[tensor.dtype]):
        raise ValueError(
            f"it holds {found.dtype} {found.shape}, not {DTYPES[tensor.dtype]} {wanted}"
        )
    if sums is not None and _sha256(path) != sums.get(path.name):
        raise ValueError("its sha256 is not the one that was saved")


def _read_header(folder: Path, model: KSparseAutoencoder) -> dict[str, Any]:
    try:
        header = read_object(folder / "state.json")
    except ValueError as error:
        raise ValueError(f"{folder} is no k-SAE checkpoint: {error}") from error
    for name, value in _header(model).items():
        if header.get(name) != value:
            raise ValueError(
                f"{folder} has {name} {header.get(name)!r}, not {value!r}: resume with the "
                "settings it was made with"
            )
    if missing := [name for name in _COUNTERS if name not in header]:
        raise ValueError(f"{folder}/state.json lacks {', '.join(missing)}: use an older checkpoint")
    if "sha256" in header or "files" in header:
        said = header.pop("sha256", None)
        if said != _sum_of(header) or not isinstance(header.get("files"), dict):
            raise _damaged(folder, "state.json", "it is not what was saved")
    for name in _COUNTERS:
        if not _possible(name, header[name]):
            shown = printable(repr(header[name])[:60])
            raise _damaged(folder, "state.json", f"{name} can't be {shown}")
    if header["samples"] < header["step"]:
        raise _damaged(folder, "state.json", "it has seen fewer rows than it took steps")
    return header


def _possible(name: str, value: Any) -> bool:
    if name in _COUNTS:
        return type(value) is int and 0 <= value < 1 << 62
    if name == "stopped":
        return isinstance(value, bool)
    if value is None:
        return name == "window_best"
    return (
        type(value) in (int, float) and math.isfinite(value) and (name != "variance" or value >= 0)
    )


def _damaged(folder: Path, name: str, why: object) -> ValueError:
    where = printable(folder / name)
    why = str(why).removeprefix(where).lstrip(": ")
    return ValueError(
        f"{where} is damaged ({why}): remove {folder.name} and resume from an older one"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_of(content: Mapping[str, Any]) -> str:
    """The sha256 of plain values, whatever the order and layout they are written in."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _header(model: KSparseAutoencoder) -> dict[str, Any]:
    header = {"format": FORMAT, "d": model.d, "n": model.n, "k": model.k, "mode": model.mode}
    if model.format > 1:
        header |= {"activation": model.activation, "prefixes": list(model.prefixes)}
    return header


def _tensors(model: KSparseAutoencoder, state: TrainState) -> dict[str, Tensor]:
    weights, moments = model.weights, state.moments
    found = {"last": moments.last, "fired_at": state.fired_at}
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        of = getattr(moments, name)
        found |= {
            name: getattr(weights, name),
            f"{name}.mean": of.mean,
            f"{name}.square": of.square,
        }
    if model.threshold is not None:
        found["threshold"] = model.threshold
    if state.threshold is not None:
        found |= {"threshold.mean": state.threshold.mean}
        found |= {"threshold.square": state.threshold.square}
    return found
