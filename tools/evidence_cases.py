"""The cases of docs/evidence.md: which activations, which recipe, which pictures are judged on.

The settings were fixed before the seeds that are judged were trained, on other pictures than these.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from revelio.data.config import DataConfig
from revelio.data.open import open_dataset
from revelio.files import write_whole, write_whole_by
from revelio.sae.config import Rows, RunConfig

Pictures = Literal["fashion-mnist", "cifar10", "caltech101"]


@dataclass(frozen=True)
class Case:
    """What a row is, and the recipe.

    Attributes:
        name: a folder for it.
        rows: as `train-ksae` has it.
        recipe: fixed before the seeds that are judged.
        seeds: of the trainings that are judged.
        other_k: of one training each, for the curves over k.
        train: pictures to learn from; None: all.
        test: pictures to judge on; None: all.
        loss_images: pictures that go through the model.
        model: the backbone.
        layer: of the backbone.
        timesteps: one, or none for a model without noise.
        pictures: the data set's name.
        cells: of a training picture that are kept, where rows are cells.
        chosen_k: a k that looked better on the curves over k, and is trained anew for it; None: none did.
        variants: other k-SAEs of the same recipe: BatchTopK and Matryoshka.
        planted: seeds of the sets of synthetic activations.
        distinct: seeds of the trainings whose distinct latents are compared. That measure was added after the
            others had been seen, so it is taken of trainings that nobody had seen.
    """

    name: str
    rows: Rows
    recipe: RunConfig
    seeds: tuple[int, ...]
    other_k: tuple[int, ...]
    train: int | None = None
    test: int | None = None
    loss_images: int = 100
    model: str = "mini-sd"
    layer: str = "up_ft1"
    timesteps: tuple[int, ...] = (100,)
    pictures: Pictures = "fashion-mnist"
    cells: int = 32
    chosen_k: int | None = None
    variants: bool = False
    planted: range = range(5)
    distinct: range = range(61, 69)

    def extraction(self, split: str) -> dict[str, Any]:
        """What is kept of a picture: its mean; some cells to learn from, all to judge on."""
        if self.rows == "images":
            return {"pool": "mean"}
        return {"cells": self.cells} if split == "train" else {"pool": "none"}


POOLED = Case(
    "pooled", "images",
    RunConfig(
        k=4, expansion=2, steps=2000, batch_size=1024, learning_rate=2e-3, warmup_steps=100,
        checkpoint_every=500,
    ),
    seeds=(11, 12, 13, 14, 15), other_k=(2, 8, 16),
)  # fmt: skip
CELLS = Case(
    "cells", "cells",
    RunConfig(
        k=2, expansion=2, steps=4000, batch_size=2048, learning_rate=8e-3, warmup_steps=100, decay=0.8,
        checkpoint_every=2000,
    ),
    seeds=tuple(range(21, 31)), other_k=(1, 4, 8, 16), train=30_000, test=5_000, loss_images=400,
    chosen_k=8, variants=True,
)  # fmt: skip
PHOTO = Case(
    "photo", "cells",
    RunConfig(
        k=3, expansion=2, steps=10_000, batch_size=2048, learning_rate=8e-3, warmup_steps=100, decay=0.8,
        checkpoint_every=5000,
    ),
    seeds=tuple(range(41, 49)), other_k=(1, 2, 4, 8), loss_images=400,
    model="mini-sd-photo", pictures="cifar10", cells=16,
    # Five sets had not told the k-SAE from k-means: these are fifteen others, judged by themselves.
    planted=range(5, 20),
)  # fmt: skip
VIT = Case(
    "vit", "cells",
    RunConfig(
        k=16, expansion=2, steps=3000, batch_size=2048, learning_rate=8e-3, warmup_steps=100, decay=0.8,
        checkpoint_every=1500,
    ),
    seeds=tuple(range(51, 56)), other_k=(4, 8, 32), loss_images=400, model="vit-s-14-focus",
    layer="block11", timesteps=(), pictures="caltech101", cells=64, distinct=range(61, 66),
)  # fmt: skip
CASES = {case.name: case for case in (PHOTO, VIT, CELLS, POOLED)}
# Of CIFAR-10's 40,000 pictures in a random order: those that the recipe was judged on while it was searched
# for, then those that it is judged on here. The k-SAEs that are judged learn from all but the latter.
SEARCHED, JUDGED = 8000, 8000
# Of Caltech-101's test pictures those that a recipe was judged on while it was searched for.
SEARCHED_CALTECH = 1500


def pictures_of(case: Case, place: Path, work: Path, split: str) -> DataConfig:
    """A split's pictures; no picture that a search was judged on is in the test split."""
    limit = case.train if split == "train" else case.test
    if case.pictures == "cifar10":
        return DataConfig(source=str(_part(place, work, split)), limit=limit)
    if case.pictures == "caltech101" and split == "test":
        place = _unseen(place, work)
    return DataConfig(source=case.pictures, root=place, split=split, limit=limit)


def _unseen(root: Path, work: Path) -> Path:
    """Caltech-101 with the test pictures alone that no search was judged on, as links to its images."""
    made = work / "pictures" / "caltech101"
    if not (made / "test.txt").is_file():
        some = DataConfig(source="caltech101", root=root, split="test", limit=SEARCHED_CALTECH)
        seen = set(open_dataset(some).ids)
        (made / "images").parent.mkdir(parents=True, exist_ok=True)
        if not (made / "images").is_symlink():
            (made / "images").symlink_to((root / "images").resolve(), target_is_directory=True)
        for name in ("train.txt", "test.txt"):
            lines = (root / name).read_text().split("\n")
            kept: Sequence[str] = [one for one in lines if one and one not in seen]
            write_whole(made / name, "\n".join(kept) + "\n")
    return made


def _part(source: Path, work: Path, split: str) -> Path:
    """A part of CIFAR-10's pictures as a parquet file of its own, made at its first use."""
    import pyarrow.parquet

    path = work / "pictures" / f"{split}.parquet"
    if not path.is_file():
        table = pyarrow.parquet.read_table(source)
        # As the search drew the pictures that it judged on.
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(5))
        test = order[SEARCHED : SEARCHED + JUDGED]
        kept = torch.isin(torch.arange(len(table)), test, invert=split == "train")
        rows = table.take(kept.nonzero()[:, 0].numpy())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole_by(path, lambda made: pyarrow.parquet.write_table(rows, made))
    return path
