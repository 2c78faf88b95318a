"""The independent classifier that judges samples: a small CNN trained on real Fashion-MNIST only.

It never sees a sample, a latent or a text; its own accuracy on held-out pictures is reported beside.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from revelio.seeds import lent
from tools.mini.data import PictureSet

BATCH = 128


def build_judge(classes: int) -> nn.Sequential:
    """Three convolutions and two linear layers for 32x32 grey pictures."""
    widths = (1, 16, 32, 64)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, classes)]
    return nn.Sequential(*layers)


def grey(images: torch.Tensor) -> torch.Tensor:
    """uint8 `(n, 1 or 3, 32, 32)` -> `(n, 1, 32, 32)` in [0, 1]."""
    return images.float().mean(1, keepdim=True) / 255.0


def train_judge(pictures: PictureSet, epochs: int, seed: int) -> nn.Sequential:
    """Train on real pictures with random shifts of up to two pixels."""
    generator = torch.Generator().manual_seed(seed)
    with lent(seed):
        model = build_judge(len(pictures.class_names))
    steps = epochs * (len(pictures) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(pictures), generator=generator)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            batch = grey(pictures.images[rows]).roll(shift, (2, 3))
            loss = F.cross_entropy(model(batch), pictures.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Predicted classes `(n,)` of uint8 pictures."""
    return torch.cat([model(grey(part)).argmax(1) for part in images.split(500)])
