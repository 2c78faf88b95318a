"""Training Diff-C: AdamW at 1e-4 with a cosine by epoch, cross-entropy, batches of 16; its checkpoints.

    lr(e) = end + (start - end) (1 + cos(pi e / period)) / 2        for epoch e = 0, 1, ...

Source: Sec. 4.1. The paper's end is 5e-5 over 30 epochs (modes `fixed`, `as_paper`); the released code
anneals to 0 over 90 and stops at 30, which ends near 7.6e-5 (mode `as_code`).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor

from revelio.device_memory import release
from revelio.diffc.config import FitConfig
from revelio.diffc.conv import fixed_order
from revelio.diffc.model import DiffC
from revelio.diffc.shared import Share, mean_loss, part_of
from revelio.diffc.sources import PLAIN, GridSource, chunks, training_view
from revelio.run_dir import read_json, write_json
from revelio.seeds import generator, key_seed
from revelio.wording import plural

WEIGHTS, BEST, MOMENTS, REST = "model", "best", "optimizer", "training.json"


@dataclass
class EpochEnd:
    """What is logged after an epoch (counted from 1); shares are from 0 to 1."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_top1: float
    validation_top1: float | None = None
    validation_loss: float | None = None
    seconds: float = 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """What the best epoch has most of: validation top-1, and among equals the least loss."""
        return (self.validation_top1 or 0.0, -(self.validation_loss or 0.0))


@dataclass
class StepState:
    """After a batch: how many images it had, its loss, and the epoch's measures where one ended."""

    images: int
    loss: float
    end: EpochEnd | None = None


@dataclass
class Training:
    """Everything a training needs to go on: changed in place by :func:`train`.

    Attributes:
        model: the classifier, on its device.
        optimizer: over all its parameters.
        history: one entry an epoch that is done.
        best: copy of the model's state after the epoch of the best :attr:`EpochEnd.rank`.
        best_epoch: its epoch, counted from 1; 0 before there is one.
        share: this process's part of every batch, where several train it together.
    """

    model: DiffC
    optimizer: torch.optim.AdamW
    history: list[EpochEnd] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    share: Share = field(default_factory=Share)

    @classmethod
    def start(cls, model: DiffC, config: FitConfig, share: Share | None = None) -> "Training":
        """A training at its beginning."""
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        return cls(model, optimizer, share=share or Share())

    def plain(self) -> dict[str, Any]:
        """History and best epoch as plain values."""
        return {"best_epoch": self.best_epoch, "history": [asdict(end) for end in self.history]}


def train(
    training: Training,
    source: GridSource,
    indices: Sequence[int],
    config: FitConfig,
    *,
    validation: Sequence[int] = (),
) -> Iterator[StepState]:
    """Train until ``config.epochs`` are done; yields after every batch.

    An epoch's order is keyed by (seed, epoch) and its view by the epoch, so that a training that goes on
    from a checkpoint does what an uninterrupted one would have done.

    Args:
        training: where it stands; a new one from :meth:`Training.start`.
        source: grids and labels of train and validation.
        config: rates, batches, how long, and the seed.
        indices: images trained on, at least two (batch norm needs them).
        validation: images of the same source, seen plain, that pick the best epoch.

    Raises:
        ValueError: there are fewer than two images, a class id the model doesn't know, or the loss is
            not finite.
    """
    model, labels = training.model, torch.tensor(source.labels)
    _check(model, labels, indices)
    for epoch in range(len(training.history) + 1, config.epochs + 1):
        started, rate = time.monotonic(), config.rate(epoch - 1)
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        total = hits = 0.0
        batches = epoch_batches(indices, config.batch_size, config.seed, epoch)
        for number, batch in enumerate(batches, 1):
            own = batch[training.share.of(len(batch))]
            grids = _grids(source, own, training_view(epoch, source.views))
            with (
                _dropout_stream(model, config.seed, epoch, number),
                part_of(training.share, len(batch)),
            ):
                loss, right = _step(training, grids, labels[own])
            total, hits = total + loss * len(batch), hits + right
            state = StepState(len(batch), loss)
            if number == len(batches):
                state.end = EpochEnd(epoch, rate, total / len(indices), hits / len(indices))
                _end_epoch(training, source, labels, validation, config, state.end)
                state.end.seconds = time.monotonic() - started
            yield state


def _end_epoch(
    training: Training,
    source: GridSource,
    labels: Int64[Tensor, " n"],
    validation: Sequence[int],
    config: FitConfig,
    end: EpochEnd,
) -> None:
    if validation:
        truth = labels[list(validation)]
        logits = predict(training.model, source, validation, config.batch_size, training.share)
        end.validation_top1 = (logits.argmax(dim=1) == truth).float().mean().item()
        end.validation_loss = F.cross_entropy(logits, truth).item()
        if all(end.rank > past.rank for past in training.history):
            state = training.model.state_dict()
            training.best = {name: value.detach().clone() for name, value in state.items()}
            training.best_epoch = end.epoch
    training.history.append(end)


def _step(training: Training, grids: Tensor, labels: Int64[Tensor, " b"]) -> tuple[float, int]:
    """One update; the whole batch's loss and how many of it were right, for which a device is waited once."""
    model, share = training.model.train(), training.share
    device = next(model.parameters()).device
    labels = labels.to(device, non_blocking=True)
    with fixed_order(device):
        logits = model(grids.to(device, non_blocking=not grids.is_cuda))
        loss = mean_loss(logits, labels)
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        right = share.sum_((logits.detach().argmax(dim=1) == labels).sum())
        told = torch.stack([share.sum_(loss.detach()).double(), right.double()]).tolist()
        if not isfinite(told[0]):
            raise ValueError(
                f"the loss became {told[0]}: lower the learning rate or check the grids"
            )
        share.sum_gradients(model)
        training.optimizer.step()
    return told[0], int(told[1])


def _grids(source: GridSource, indices: Sequence[int], view: int) -> Tensor:
    """The images' grids, also of none, as where there are more processes than images."""
    return source.grids(indices, view) if len(indices) else torch.zeros(0, *source.shape)


@torch.no_grad()
def predict(
    model: DiffC,
    source: GridSource,
    indices: Sequence[int],
    batch_size: int = 32,
    share: Share | None = None,
) -> Float[Tensor, "n classes"]:
    """The logits of the images' plain views; on the CPU, and of all images on every process.

    Batches that go beyond the device's memory are halved.
    """
    model.eval()
    share, device = share or Share(), next(model.parameters()).device
    found, left = [torch.zeros(0, model.classes, device=device)], indices[share.of(len(indices))]
    while left:
        batch = left[:batch_size]
        try:
            grids = source.grids(batch, PLAIN).to(device)
            with fixed_order(device):
                found.append(model(grids))
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise
            release(error)
            batch_size //= 2  # rounding apart, the logits don't depend on it
        else:
            left = left[batch_size:]
    return share.gather(torch.cat(found), len(indices)).cpu()


def epoch_batches(
    indices: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """An epoch's batches: all indices once, in an order keyed by (seed, epoch).

    A single last image joins the batch before: batch norm can't see a 1x1 map of one image alone.
    """
    order = torch.randperm(len(indices), generator=generator(seed, "diffc order", epoch)).tolist()
    batches = list(chunks([indices[i] for i in order], batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


@contextmanager
def _dropout_stream(model: DiffC, seed: int, epoch: int, batch: int) -> Iterator[None]:
    """Dropout reads PyTorch's global generators: lend the model's a keyed state, and put the old one back."""
    if model.dropout.p == 0:
        yield
        return
    device, key = next(model.parameters()).device, key_seed(seed, "diffc dropout", epoch, batch)
    cards = [device] if device.type == "cuda" else []
    # Of all cards PyTorch would take the states, and warn of that where there are several.
    with torch.random.fork_rng(cards):
        torch.default_generator.manual_seed(key)
        for card in cards:
            with torch.cuda.device(card):
                torch.cuda.manual_seed(key)
        yield


def _check(model: DiffC, labels: Int64[Tensor, " n"], indices: Sequence[int]) -> None:
    if len(indices) < 2:
        raise ValueError("Diff-C trains on at least two images (it has batch norms)")
    if int(labels.max()) >= model.classes:
        raise ValueError(
            f"a label is {int(labels.max())}, but the model has {plural(model.classes, 'class', 'classes')} "
            f"(0 to {model.classes - 1}): give as many classes as the labels have"
        )


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
        raise ValueError(f"can't go on from {folder}: {reason}; start another run") from error
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
