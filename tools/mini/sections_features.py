"""Activations by layer and timestep, judged on Fashion-MNIST; the parts are used for photographs too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from revelio.backbones.base import Backbone
from revelio.backbones.random_init import load_random_backbone
from revelio.backbones.registry import load_backbone
from tools.mini.data import PictureSet, load_fashion_mnist
from tools.mini.features import activations, as_picture, ids_of, pixel_rows
from tools.mini.latents_purity import ksae_purity
from tools.mini.probe import ProbeData, probe
from tools.mini.report import Figures, Inputs

POOL, TEST = 1500, 2000
PER_CLASS = (10, 100)
TIMESTEPS = (25, 100, 300)
# mini-dit's blocks are closer to pixels than mini-sd's: it takes all held-out pictures to tell them apart.
DIT_TIMESTEPS, DIT_TEST = (5, 25, 100), 10_000


def some(pictures: PictureSet, per_class: int, split: str) -> tuple[PictureSet, list[str]]:
    """The first `per_class` pictures of every class, and their ids."""
    kept = [
        (pictures.labels == label).nonzero().flatten()[:per_class]
        for label in range(len(pictures.class_names))
    ]
    rows = torch.cat(kept).sort().values
    return pictures.subset(rows), ids_of(pictures, rows, split)


def both(cells: torch.Tensor, pool: PictureSet, test: PictureSet) -> ProbeData:
    """Rows of pool and test, taken apart again."""
    rows = cells.numpy()
    count = len(pool)
    return ProbeData(rows[:count], pool.labels.numpy(), rows[count:], test.labels.numpy())


def pixels_of(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures through the backbone's own transform."""
    return torch.stack([backbone.transform(as_picture(image)) for image in images])


def measure_backbone(
    backbone: Backbone,
    pool: tuple[PictureSet, list[str]],
    test: tuple[PictureSet, list[str]],
    timesteps: tuple[int | None, ...],
    per_class: tuple[int, ...],
    *,
    purity: bool,
) -> list[Figures]:
    """One entry a layer and timestep: probes, and on request the purity of a k-SAE's latents."""
    pixels = torch.cat([pixels_of(backbone, s.images) for s in (pool[0], test[0])])
    layers = list(backbone.layers)
    entries = []
    for timestep in timesteps:
        found = activations(backbone, pixels, pool[1] + test[1], layers, timestep)
        for layer, one in found.items():
            data = both(one.cells, pool[0], test[0])
            entry: Figures = {"layer": layer, "timestep": timestep, "d": one.pooled.shape[1]}
            entry["probe"] = {str(count): probe(data, count) for count in per_class}
            if purity:
                held = one.pooled[len(pool[0]) :]
                entry["ksae"] = short(ksae_purity(held, test[0].labels, test[0].class_names))
            entries.append(entry)
    return entries


def short(entry: dict[str, Any]) -> Figures:
    """Of a purity entry, what the table shows."""
    if "majority_share" not in entry:
        return {"latents": entry["latents"], "notes": entry["notes"]}
    wanted = ("sigma_label", "interval", "chance", "majority_share", "latents", "null_z")
    picked = {key: entry[key] for key in wanted}
    return picked | {
        "majority_interval": entry["intervals"]["majority_share"],
        "majority_chance": entry["chance_levels"]["majority_share"],
    }


def pixel_baseline(
    pool: PictureSet, test: PictureSet, sides: tuple[int, ...], per_class: tuple[int, ...]
) -> list[Figures]:
    """The same probe on pixels at several sizes; the best is the one to beat."""
    entries = []
    for side in sides:
        rows = np.concatenate([pixel_rows(pool.images, side), pixel_rows(test.images, side)])
        data = both(torch.from_numpy(rows), pool, test)
        probes = {str(count): probe(data, count) for count in per_class}
        entries.append({"side": side, "probe": probes})
    return entries


def fashion_features(
    inputs: Inputs, name: str, timesteps: tuple[int | None, ...], count: int
) -> Figures:
    """A mini model's layers on held-out Fashion-MNIST against random weights and pixels."""
    pool = some(load_fashion_mnist(inputs.fashion(), "train"), POOL // 10, "train")
    test = some(load_fashion_mnist(inputs.fashion(), "test"), count // 10, "test")
    folder = str(inputs.models / name)
    trained = load_backbone(folder)
    untrained = load_random_backbone(folder, inputs.seed)
    return {
        "model": name,
        "pool": len(pool[0]),
        "test": len(test[0]),
        "trained": measure_backbone(trained, pool, test, timesteps, PER_CLASS, purity=True),
        "random": measure_backbone(untrained, pool, test, timesteps, PER_CLASS, purity=True),
        "pixels": pixel_baseline(pool[0], test[0], (32, 16, 8), PER_CLASS),
    }


def mini_sd(inputs: Inputs) -> Figures:
    """mini-sd's decoder blocks."""
    return fashion_features(inputs, "mini-sd", TIMESTEPS, TEST)


def mini_dit(inputs: Inputs) -> Figures:
    """mini-dit's transformer blocks."""
    return fashion_features(inputs, "mini-dit", DIT_TIMESTEPS, DIT_TEST)
