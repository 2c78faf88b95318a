"""Fakes for analysis tests: a store in memory and a k-SAE whose codes are written down."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Codes(NamedTuple):
    values: Tensor
    indices: Tensor


class FakeKSAE(nn.Module):
    """The activations are the pre-activations: latent j reads channel j."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.d = self.n = n
        self.k, self.mode = k, "fixed"
        self.weight = nn.Parameter(torch.eye(n))

    def preactivations(self, x: Tensor, latents: slice | None = None) -> Tensor:
        return x[:, latents or slice(None)]

    def encode(self, x: Tensor) -> Codes:
        found = torch.sort(x, dim=1, descending=True, stable=True)
        return Codes(found.values[:, : self.k].relu(), found.indices[:, : self.k])

    def decode(self, codes: Codes) -> Tensor:
        x = torch.zeros(len(codes.values), self.n)
        return x.scatter_add_(1, codes.indices, codes.values) @ self.weight


class FakeStore:
    """An activation store in memory."""

    def __init__(
        self,
        rows: Tensor,
        labels: Tensor | None = None,
        classes: tuple[str, ...] = (),
        path: Path = Path("fake"),
        ids: list[str] | None = None,
    ) -> None:
        self._rows, self.labels, self.classes, self.path = rows, labels, classes, path
        self.ids = ids or [f"image{i}" for i in range(len(rows))]
        self.row_shape = tuple(rows.shape[1:])
        self.manifest = {"model": "fake", "layer": "up_ft1", "timestep": 25, "dataset": "fakes"}

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, batch_size: int):
        for start in range(0, len(self), batch_size):
            yield start, self._rows[start : start + batch_size]

    def write_manifest(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "manifest.json").write_text(json.dumps(self.manifest))


def brute_force_top(codes: Tensor, m: int) -> tuple[list[list[float]], list[list[int]]]:
    """Top m positive codes of each latent by plain sorting; ties to the lower row."""
    values, indices = [], []
    for latent in range(codes.shape[1]):
        column = [(-float(v), row) for row, v in enumerate(codes[:, latent]) if v > 0]
        best = sorted(column)[:m]
        pad = m - len(best)
        values.append([-v for v, _ in best] + [0.0] * pad)
        indices.append([row for _, row in best] + [-1] * pad)
    return values, indices
