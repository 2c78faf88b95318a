"""Probes that are small networks on grids of frozen activations, trained alike.

attention   tokens = LayerNorm(cells of the grid), class = W MultiHeadAttention(query, tokens, tokens): a
            learned query collects what it needs, as in the attentive probes of Chen et al. 2024 (context
            autoencoders, Sec. 4.1), with one query
resnet      a residual network (He et al. 2016, Sec. 4.2: three stages, for small pictures), as the baseline
            "SD features" of Li et al. 2023 puts on the bottleneck's grids; theirs has 520 M parameters

The linear probe sees the mean over the grid, Diff-C is a network of its own.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from revelio.probes.chosen import Probed
from revelio.probes.score import score
from revelio.probes.split import validation_part
from revelio.seeds import generator, key_seed, lent

MOST_HEADS, HEAD_WIDTH = 8, 32
LEARNING_RATES = (1e-3, 1e-2)
WIDTHS, BLOCKS = (64, 128, 256), 2
# From channels and classes to a network of grids -> logits.
Builder = Callable[[int, int], nn.Module]


class AttentionPool(nn.Module):
    """Grids to classes, through one query of multi-head attention."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        fitting = (n for n in range(1, MOST_HEADS + 1) if channels % n == 0)
        heads = max(n for n in fitting if n == 1 or channels // n >= HEAD_WIDTH)
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, channels))
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.head = nn.Linear(channels, classes)

    def forward(self, grid: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Logits."""
        tokens = self.norm(grid.flatten(2).mT)
        query = self.query.expand(len(grid), -1, -1)
        pooled, _ = self.attention(query, tokens, tokens, need_weights=False)
        return self.head(pooled[:, 0])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, Fig. 2)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = channels == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Half the size where the stride is 2."""
        return functional.relu(self.path(x) + self.shortcut(x))


def resnet(channels: int, classes: int) -> nn.Module:
    """Grids to classes: three stages of residual blocks, the mean over the grid, and a linear layer."""
    blocks, before = [], channels
    for stage, width in enumerate(WIDTHS):
        for number in range(BLOCKS):
            blocks.append(ResidualBlock(before, width, 2 if stage and not number else 1))
            before = width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
    return nn.Sequential(nn.BatchNorm2d(channels, affine=False), *blocks, *head)


NETWORKS: dict[str, Builder] = {"attention": AttentionPool, "resnet": resnet}


def network_probe(
    name: str,
    train: Float[Tensor, "n c h w"],
    train_labels: Int64[np.ndarray, " n"],
    test: Float[Tensor, "m c h w"],
    test_labels: Int64[np.ndarray, " m"],
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 30,
    batch_size: int = 32,
    validation: float = 0.2,
    seed: int = 0,
    device: str = "cpu",
) -> Probed:
    """Train the probe, keep the learning rate and epoch that are best on a validation part, and test it.

    Args:
        name: of the network, in ``NETWORKS``.
        train: grids of activations, on any device and in any number format.
        train_labels: their classes.
        test: grids of other images.
        test_labels: their classes.
        learning_rates: of AdamW, each falling to 0 along a cosine; the ``setting`` of the result is the one
            that was kept, of equally good ones the first.
        epochs: passes over the training part.
        batch_size: images a step.
        validation: the share of each class's training rows to choose on.
        seed: of the first weights, the order, and the validation part.
        device: where it is trained.

    Raises:
        ValueError: a class has only one training row, or ``epochs`` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}: it must be at least 1")
    known, held = (
        torch.from_numpy(rows) for rows in validation_part(train_labels, validation, seed)
    )
    labels = torch.from_numpy(train_labels)
    by_rate: dict[float, float] = {}
    best: nn.Module | None = None
    for rate in learning_rates:
        model = _initial(name, train.shape[1], int(labels.max()) + 1, seed).to(device)
        weights = copy.deepcopy(model.state_dict())
        by_rate[rate] = -1.0
        for _ in _epochs(model, train, labels, known, rate, epochs, batch_size, seed):
            found = predict(model, train[held], batch_size)
            right = float((found == train_labels[held.numpy()]).mean())
            if right > by_rate[rate]:
                by_rate[rate], weights = right, copy.deepcopy(model.state_dict())
        if max(by_rate, key=lambda rate: by_rate[rate]) == rate:
            model.load_state_dict(weights)
            best = model
    assert best is not None
    start = perf_counter()
    predicted = predict(best, test, batch_size).tolist()
    accuracy = score(predicted, test_labels.tolist(), perf_counter() - start)
    return Probed(accuracy, predicted, max(by_rate, key=lambda rate: by_rate[rate]), by_rate)


def _initial(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    with lent(key_seed(seed, "attention_pool")):
        return NETWORKS[name](channels, classes)


def _epochs(
    model: nn.Module,
    grids: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    rows: Int64[Tensor, " k"],
    rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> Iterator[None]:
    """Train on some rows in place; yields after each epoch."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    steps = epochs * -(-len(rows) // batch_size)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=generator(seed, "attention_pool", epoch))
        model.train()
        for some in rows[order].split(batch_size):
            if len(some) == 1 < len(rows):  # batch norm has nothing to compare a single image with
                continue
            logits = model(grids[some].to(device).float())
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels[some].to(device)).backward()
            optimizer.step()
            falling.step()
        yield


@torch.no_grad()
def predict(
    model: nn.Module, grids: Float[Tensor, "n c h w"], batch_size: int
) -> Int64[np.ndarray, " n"]:
    """The likeliest class of each grid."""
    device = next(model.parameters()).device
    model.eval()
    found = [model(part.to(device).float()).argmax(1).cpu() for part in grids.split(batch_size)]
    return torch.cat(found).numpy()
