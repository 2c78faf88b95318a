"""A training on disk: weights, Adam's moments and the best weights as safetensors, the rest as JSON."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from revelio.diffc.train import EpochEnd, Training
from revelio.run_dir import read_json, write_json

WEIGHTS, BEST, MOMENTS, REST = "model", "best", "optimizer", "training.json"


def save_training(training: Training, folder: Path) -> None:
    """Write everything that :func:`load_training` needs into a folder that exists."""
    _save(training.model.state_dict(), folder / f"{WEIGHTS}.safetensors")
    if training.best:
        _save(training.best, folder / f"{BEST}.safetensors")
    moments = {
        f"{number}.{name}": value
        for number, entries in training.optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }
    _save(moments, folder / f"{MOMENTS}.safetensors")
    write_json(folder / REST, training.plain())


def load_training(training: Training, folder: Path) -> None:
    """Bring a new training to where the saved one stood.

    Raises:
        ValueError: the folder's files are missing, broken or of another model.
    """
    try:
        training.model.load_state_dict(load_file(folder / f"{WEIGHTS}.safetensors"))
        moments = load_file(folder / f"{MOMENTS}.safetensors")
        best = folder / f"{BEST}.safetensors"
        training.best = load_file(best) if best.exists() else {}
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"can't go on from {folder}: {reason}; choose another --out") from error
    device = next(training.model.parameters()).device
    training.best = {name: value.to(device) for name, value in training.best.items()}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    groups = training.optimizer.state_dict()["param_groups"]
    training.optimizer.load_state_dict({"state": state, "param_groups": groups})
    rest: dict[str, Any] = read_json(folder / REST)
    training.best_epoch = rest["best_epoch"]
    training.history = [EpochEnd(**entry) for entry in rest["history"]]


def _save(tensors: dict[str, Any], path: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
