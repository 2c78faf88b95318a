"""Fakes for analysis tests: a store in memory and a k-SAE whose codes are written down."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from sae_helpers import random_model
from torch import Tensor, nn

from revelio.activations.store import write_store
from revelio.analysis.config import TopImagesConfig
from revelio.analysis.top_images import top_images
from revelio.analysis.top_images_files import with_source
from revelio.data.dataset import ImageDataset


class Codes(NamedTuple):
    values: Tensor
    indices: Tensor


class FakeKSAE(nn.Module):
    """The activations are the pre-activations: latent j reads channel j."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.d = self.n = n
        self.k, self.mode, self.trained_on = k, "fixed", {}
        self.W_enc = nn.Parameter(torch.eye(n))

    def preactivations(self, x: Tensor, latents: slice | None = None, source: Any = None) -> Tensor:
        return x[:, latents or slice(None)]

    def normalized(self, x: Tensor, source: Any = None) -> Tensor:
        return x

    def encode(self, x: Tensor, source: Any = None, latents: Tensor | None = None) -> Codes:
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


def gallery_parts(
    folder: Path, *, labelled: bool = True, classes: tuple[str, ...] = ("a", "b", "c")
):
    """A trained-looking k-SAE, a real store in ``folder``, its top images, and coloured pictures."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % len(classes)
    rows = torch.randn(60, 12, generator=generator) * 0.4
    rows[:, :3] += 2.0 * torch.nn.functional.one_hot(labels, 3)
    ids = [picture_id(i) for i in range(60)]
    settings = {"model": "toy", "dataset": "toys", "layer": "up_ft1", "timestep": 25}
    settings["classes"] = list(classes) if labelled else []
    store = write_store(folder, rows, ids, labels.tolist() if labelled else None, settings=settings)
    model = random_model(d=12, n=48, k=6, seed=3)
    top = with_source(top_images(model, store, TopImagesConfig(m=12)), model, store)
    # The data set lists the pictures in another order than the store.
    order = list(reversed(range(60)))
    dataset = ImageDataset(
        name="toys",
        split=None,
        classes=tuple(settings["classes"]),
        ids=[ids[i] for i in order],
        labels=[int(labels[i]) for i in order] if labelled else None,
        read=lambda index: toy_picture(order[index]),
    )
    return model, store, top, dataset


def toy_picture(number: int) -> Image.Image:
    """A wide picture whose colour is its class's, a little varied."""
    colour = [40 + number, 40 + number, 40 + number]
    colour[number % 3] = 220
    return Image.new("RGB", (36, 24), tuple(colour))


def picture_id(number: int) -> str:
    """Where a picture lies in its folder: in one of two classes."""
    return f"{('one', 'two')[number % 2]}/{number:02d}.png"


def write_pictures(folder: Path) -> Path:
    """The pictures of :func:`gallery_parts` as files."""
    for number in range(60):
        path = folder / picture_id(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        toy_picture(number).save(path)
    return folder
