"""Checkpoints of a training run: weights, moments, position. Resumed on a CPU, a run is bit-equal.

A folder of one safetensors file a tensor (so that saving needs no second copy of them all) and
``state.json``. Randomness needs no place here: rows are ordered by (seed, epoch).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from revelio.sae.model import KSparseAutoencoder
from revelio.sae.state import TrainState

FORMAT = 1
_COUNTERS = (
    "variance",
    "step",
    "epoch",
    "batch",
    "samples",
    "stopped",
    "window_sum",
    "window_best",
)


class Files(Protocol):
    """How tensors are written and read."""

    def save(self, path: Path | None, tensors: Mapping[str, Tensor]) -> None:
        """Write one file; only the process that has a path writes."""
        ...

    def load(self, path: Path, name: str, into: Tensor) -> None:
        """Fill a tensor from the file that holds it."""
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
    for name, tensor in _tensors(model, state).items():
        files.save(folder and folder / f"{name}.safetensors", {name: tensor})
    if folder is not None:
        counters = {name: getattr(state, name) for name in _COUNTERS}
        (folder / "state.json").write_text(json.dumps(_header(model) | counters, indent=2) + "\n")


def checkpoint_bytes(model: KSparseAutoencoder, state: TrainState) -> int:
    """How much room this process's part of a checkpoint takes."""
    return sum(tensor.nbytes for tensor in _tensors(model, state).values())


@torch.no_grad()
def load_checkpoint(
    folder: Path, model: KSparseAutoencoder, files: Files | None = None
) -> TrainState:
    """Fill the model and give the training state that :func:`save_checkpoint` wrote.

    Raises:
        ValueError: the folder is no checkpoint, is damaged, or is of another model.
    """
    header = _read_header(folder, model)
    files = files or WholeFiles()
    state = TrainState.start(model)
    for name, tensor in _tensors(model, state).items():
        path = folder / f"{name}.safetensors"
        try:
            files.load(path, name, tensor)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove {folder.name} and resume from an older one"
            ) from error
    for name in _COUNTERS:
        setattr(state, name, header[name])
    return state


def _read_header(folder: Path, model: KSparseAutoencoder) -> dict[str, Any]:
    try:
        header = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no k-SAE checkpoint: {error}") from error
    for name, value in _header(model).items():
        if header.get(name) != value:
            raise ValueError(
                f"{folder} has {name} {header.get(name)!r}, not {value!r}: resume with the "
                "settings it was made with"
            )
    if missing := [name for name in _COUNTERS if name not in header]:
        raise ValueError(f"{folder}/state.json lacks {', '.join(missing)}: use an older checkpoint")
    return header


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
