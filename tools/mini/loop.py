"""The training loop of every mini model: timed, resumable, with a moving average of the weights.

A `Trainer` owns the weights, the optimizer, the average and one generator from which all of a
step's randomness is drawn, and saves them whole, so that a killed run continues as if nothing had
happened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tools.mini.configs import Schedule

LossFunction = Callable[[torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class State:
    """Where a training stands after a step; the loss stays on its device, as reading it would wait for it."""

    step: int
    images: int
    seconds: float
    loss: torch.Tensor
    learning_rate: float


def learning_rate(schedule: Schedule, step: int, progress: float) -> float:
    """Warm-up by step, then flat, then linear to zero over the last `decay` share of the time."""
    warm = min(1.0, (step + 1) / max(1, schedule.warmup_steps))
    cool = min(1.0, max(0.0, 1.0 - progress) / max(schedule.decay, 1e-9))
    return schedule.learning_rate * warm * cool


def save_whole(payload: object, path: Path) -> None:
    """`torch.save` under a temporary name, renamed when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(payload, temporary)
    os.replace(temporary, path)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes; nothing to do for one."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def of_first_process(value: float) -> float:
    """The first process's value in all of them, so that all agree on the rate and the end."""
    if not dist.is_initialized():
        return value
    held = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(held, 0)
    return float(held)


class Trainer:
    """Weights, optimizer, moving average, generator and clock of one training, on the model's device."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.model = model
        self.schedule = schedule
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.average = [p.detach().clone() for p in self.parameters]
        decayed = [p for p in self.parameters if p.ndim > 1]
        plain = [p for p in self.parameters if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": schedule.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=schedule.learning_rate, betas=(0.9, schedule.beta2), fused=True
        )
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.generator = torch.Generator(self.device)
        self.generator.manual_seed(schedule.seed + 1000 * self.rank)
        self.step = 0
        self.images = 0
        self.seconds = 0.0

    def update(self, loss_function: LossFunction) -> State:
        """One optimizer step."""
        start = time.perf_counter()
        progress = self.seconds / (60.0 * self.schedule.minutes)
        rate = learning_rate(self.schedule, self.step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.schedule.precision == "bfloat16"
        ):
            loss = loss_function(self.generator)
        loss.backward()
        average_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.images += self.schedule.batch
        self._update_average()
        self.seconds = of_first_process(self.seconds + time.perf_counter() - start)
        return State(self.step, self.images, self.seconds, loss.detach(), rate)

    @torch.no_grad()
    def _update_average(self) -> None:
        # A young average follows closely, or the random start would stay in it for thousands of steps.
        decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, self.parameters, 1.0 - decay)  # pyright: ignore  # one launch

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights with their moving average; twice is nothing."""
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            kept = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(kept)

    def save(self, path: Path) -> None:
        """Write everything a resumed run needs."""
        payload = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "images": self.images,
            "seconds": self.seconds,
        }
        save_whole(payload, path)

    def load(self, path: Path) -> None:
        """Continue from a file that `save` wrote."""
        payload = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(payload["model"])
        for mean, saved in zip(self.average, payload["average"], strict=True):
            mean.copy_(saved)
        self.optimizer.load_state_dict(payload["optimizer"])
        self.step, self.seconds = payload["step"], payload["seconds"]
        self.images = payload["images"]
        if self.rank == 0:
            self.generator.set_state(payload["generator"])
        else:
            self.generator.manual_seed(self.schedule.seed + 1000 * self.rank + self.step)


def train(trainer: Trainer, loss_function: LossFunction) -> Iterator[State]:
    """Step until the schedule's minutes are used up, yielding the state after every step."""
    while trainer.seconds < 60.0 * trainer.schedule.minutes:
        yield trainer.update(loss_function)
