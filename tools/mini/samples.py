"""The shipped sample of Fashion-MNIST: 2,000 training and 500 test pictures as one parquet file.

The columns are those of a Hugging Face image data set: `id`, `image` (PNG bytes), `label` (a
ClassLabel) and `split`.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import datasets
import torch
from PIL import Image

from tools.mini.data import PictureSet, load_fashion_mnist

COUNTS = {"train": 2000, "test": 500}


def balanced_rows(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` rows, the same number of every class, in the order of the data set."""
    generator = torch.Generator().manual_seed(seed)
    classes = labels.unique().tolist()
    chosen = []
    for label in classes:
        rows = (labels == label).nonzero().flatten()
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[: count // len(classes)]])
    return torch.cat(chosen).sort().values


def png(image: torch.Tensor) -> bytes:
    """A grey `(1, h, w)` uint8 picture as PNG, in the 32x32 that the mini models are trained on."""
    stream = io.BytesIO()
    Image.fromarray(image[0].numpy()).save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def rows_of(pictures: PictureSet, split: str, seed: int) -> list[dict[str, object]]:
    """The parquet's rows of one split."""
    rows = balanced_rows(pictures.labels, COUNTS[split], seed).tolist()
    return [
        {
            "id": f"{pictures.name}/{split}/{row:05d}",
            "image": {"bytes": png(pictures.images[row]), "path": f"{split}-{row:05d}.png"},
            "label": int(pictures.labels[row]),
            "split": split,
        }
        for row in rows
    ]


def write_samples(folder: Path, target: Path, seed: int = 0) -> int:
    """Write the sample and return how many bytes it has."""
    rows: list[dict[str, object]] = []
    names: tuple[str, ...] = ()
    for split in COUNTS:
        pictures = load_fashion_mnist(folder, split)
        names = pictures.class_names
        rows += rows_of(pictures, split, seed)
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(names)),
            "split": datasets.Value("string"),
        }
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(temporary))
    os.replace(temporary, target)
    return target.stat().st_size
