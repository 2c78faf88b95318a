"""Run a mini training in its folder: log lines, checkpoints, snapshots of the moving average.

The folder holds `metrics.jsonl` (one line every `log_steps`, others from the model's own checks),
`checkpoint.pt` (the newest, to resume from) and `snapshots/` (the moving average every
`snapshot_minutes`, for curves over training).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from revelio.mini.loop import LossFunction, State, Trainer, save_whole, train

logger = logging.getLogger(__name__)

Check = Callable[[], dict[str, float]]


def log(folder: Path, record: dict[str, object]) -> None:
    """Append one line to `metrics.jsonl` and show it."""
    line = json.dumps(record)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(line + "\n")
    logger.info(line)


def describe(trainer: Trainer, name: str) -> str:
    """One line: how many parameters train."""
    trained = sum(p.numel() for p in trainer.parameters)
    return f"{name}: {trained / 1e6:.2f} M parameters train, {trainer.schedule.minutes} minutes"


def run(
    trainer: Trainer, loss_function: LossFunction, folder: Path, *, resume: bool, check: Check
) -> None:
    """Train to the end of the schedule.

    Args:
        trainer: The training; its model is left with its moving average as weights.
        loss_function: The loss of one batch, drawn with the generator it is given.
        folder: Where logs and checkpoints go.
        resume: Continue from `checkpoint.pt` if there is one.
        check: Measures held-out figures; called with the averaged weights at every checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if resume and checkpoint.is_file():
        trainer.load(checkpoint)
    logger.info(describe(trainer, folder.name))
    if trainer.rank > 0:
        for _ in train(trainer, loss_function):
            pass
        trainer.swap()
        return
    if trainer.device.type == "cuda":
        log(folder, {"device": torch.cuda.get_device_name(trainer.device)})
    schedule, losses = trainer.schedule, []
    saved = snapped = trainer.seconds
    for state in train(trainer, loss_function):
        losses.append(state.loss)
        if state.step % schedule.log_steps == 0:
            _log_step(folder, state, losses)
            losses = []
        if state.seconds - saved >= 60 * schedule.checkpoint_minutes:
            saved = state.seconds
            trainer.save(checkpoint)
            _log_check(trainer, folder, check)
        if schedule.snapshot_minutes and state.seconds - snapped >= 60 * schedule.snapshot_minutes:
            snapped = state.seconds
            snapshot(trainer, folder)
    trainer.save(checkpoint)
    if schedule.snapshot_minutes:
        snapshot(trainer, folder)
    _log_check(trainer, folder, check)
    trainer.swap()


def _log_step(folder: Path, state: State, losses: list[torch.Tensor]) -> None:
    record: dict[str, object] = {
        "step": state.step,
        "images": state.images,
        "seconds": round(state.seconds, 1),
        "loss": round(sum(float(loss) for loss in losses) / len(losses), 5),
        "lr": float(f"{state.learning_rate:.3g}"),
        "rate": round(state.images / state.seconds, 1),
    }
    log(folder, record)


def _log_check(trainer: Trainer, folder: Path, check: Check) -> None:
    trainer.swap()
    with torch.no_grad():
        measured = check()
    trainer.swap()
    log(folder, {"step": trainer.step, "seconds": round(trainer.seconds, 1), **measured})


def snapshot(trainer: Trainer, folder: Path) -> Path:
    """Keep the moving average of now as a half-precision state dict."""
    trainer.swap()
    weights = {name: value.half().cpu() for name, value in trainer.model.state_dict().items()}
    trainer.swap()
    path = folder / "snapshots" / f"step_{trainer.step:07d}.pt"
    save_whole({"weights": weights, "step": trainer.step, "seconds": trainer.seconds}, path)
    return path
