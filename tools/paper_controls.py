"""What stands beside the paper's tables in small: linear probes of the same stores, and Diff-C on raw pixels.

Both are compared on the same images, so that small differences can be told apart; verdicts hold together, by
Holm's correction (:mod:`revelio.stats`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revelio.activations.store import ActivationStore
from revelio.advisor.measures import right_by_linear
from revelio.data.dataset import ImageDataset
from revelio.diffc.config import FitConfig
from revelio.diffc.fit import fit, right_of
from revelio.diffc.pixels import PixelsBackbone
from revelio.pipelines.reproduce_parts import Shared
from revelio.reproduce.rows import OurRow
from revelio.stats import paired, percent, rounded, told_apart, trainings95
from revelio.trust import read_object

# Training images, and pixels a side, of the comparison with raw pixels.
IMAGES, SIDES, SEEDS = (500, 3000), (16,), 3
# Ways to part the images of a probe in five.
PARTINGS = 3
# Stores that differ in one thing, by the folder of their set.
GROUPS = {
    "mini-sd, Fashion-MNIST: layers at t = 25": ("mini-sd-fashion-mnist", "*-t25-empty-d0"),
    "mini-sd, Fashion-MNIST: timesteps at up_ft1": ("mini-sd-fashion-mnist", "up_ft1-*-empty-d0"),
    "mini-dit, Fashion-MNIST: blocks at t = 25": ("mini-dit-fashion-mnist", "*-t25-empty-d0"),
    "mini-sd-photo, Caltech-101: layers at t = 25": ("mini-sd-photo-caltech101", "*-t25-empty-d0"),
    "mini-sd-photo, Caltech-101: timesteps at bottleneck": (
        "mini-sd-photo-caltech101",
        "bottleneck-*-empty-d0",
    ),
}


def layer_probes(root: Path) -> dict[str, Any]:
    """Linear probes, tested in five parts, of all pooled stores that `reproduce` left in ``root``."""
    found: dict[str, Any] = {}
    for title, (folder, pattern) in GROUPS.items():
        paths = sorted((root / "sets" / folder / "train" / "mean").glob(pattern))
        stores = [ActivationStore.open(path) for path in paths]
        if len(stores) > 1:
            found[title] = _group(stores)
    return found


def _group(stores: Sequence[ActivationStore]) -> dict[str, Any]:
    labels = stores[0].labels
    assert labels is not None and all(store.ids == stores[0].ids for store in stores)
    told = labels.numpy()
    right = {
        store.path.name: np.stack(
            [right_by_linear(store.tensor().numpy(), told, seed) for seed in range(PARTINGS)]
        )
        for store in sorted(stores, key=lambda one: one.manifest["timestep"])
    }
    return {
        "images": len(told),
        "chance": float(np.bincount(told).max() / len(told)),
        "rows": _compared(right),
    }


def _compared(right: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each accuracy with its interval, and its paired difference to the best."""
    best = max(right, key=lambda name: right[name].mean())
    others = [name for name in right if name != best]
    gaps = [paired(right[name], right[best]) for name in others]
    said = dict(zip(others, zip(gaps, told_apart(gaps), strict=True), strict=True))
    rows = []
    for name, each in right.items():
        values = each.mean(1).tolist()
        row: dict[str, Any] = {"name": name}
        row |= rounded(float(each.mean()), trainings95(values, each.shape[1]))
        if name in said:
            gap, verdict = said[name]
            row |= {"to_best": rounded(gap.value, gap.interval), "verdict": f"{verdict} the best"}
        rows.append(row)
    return rows


def against_pixels(
    shared: Shared, ours: OurRow, config: FitConfig, told: Callable[[str], None]
) -> dict[str, Any]:
    """Diff-C on a layer's grids and on raw pixels, same images and settings, several seeds.

    Args:
        shared: of an item that has the row.
        ours: the row whose grids are taken.
        config: how the classifier is trained.
        told: is told what is at work.
    """
    stores = [ActivationStore.open(shared.store(ours, part)) for part in ("train", "test")]
    labels = [store.labels for store in stores]
    assert labels[0] is not None and labels[1] is not None
    grids = {f"{ours.layers[0]}, t = {ours.row.timestep}": [store.tensor() for store in stores]}
    grids |= {
        f"pixels, {side} x {side}": list(_pixels(shared.images(ours), side)) for side in SIDES
    }
    config = replace(config, seeds=SEEDS, device="cpu")
    found: dict[str, Any] = {"seeds": SEEDS, "test images": len(labels[1])}
    for count in IMAGES:
        some = torch.linspace(0, len(labels[0]) - 1, count).long()
        right = {}
        for name, (train, test) in grids.items():
            told(f"{name} on {count} images")
            report = fit(train[some], labels[0][some], test, labels[1],
                         classes=stores[0].classes, config=config)  # fmt: skip
            right[name] = right_of(report)
        found[f"{count} training images"] = _compared(right)
    return found


def _pixels(parts: Sequence[ImageDataset], side: int) -> Iterator[Tensor]:
    model = PixelsBackbone(64, side)
    for images in parts:
        pictures = torch.stack([model.transform(images.read(n)) for n in range(len(images))])
        yield model.activations(model.encode(pictures), images.ids, ["pixels"])["pixels"]


def controls_page(probes: Mapping[str, Any], pixels: Mapping[str, Any]) -> str:
    """Both as Markdown."""
    lines = ["## Linear probes of the same stores", ""]
    for title, group in probes.items():
        head = f"{group['images']:,} images, five parts; chance {100 * group['chance']:.1f} %"
        lines += [f"{title} ({head})", "", *_table(group["rows"]), ""]
    if pixels:
        seeds, tested = pixels["seeds"], pixels["test images"]
        lines += ["## Diff-C on the model's grids and on raw pixels, Fashion-MNIST", ""]
        lines += [f"{seeds} trainings each, {tested:,} test images, the same for all.", ""]
        for title, rows in pixels.items():
            if isinstance(rows, list):
                lines += [title, "", *_table(rows), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| | top-1 % | minus the best | |", "| --- | --- | --- | --- |"]
    for row in rows:
        gap = percent(row["to_best"]) if "to_best" in row else ""
        lines.append(f"| {row['name']} | {percent(row)} | {gap} | {row.get('verdict', 'best')} |")
    return lines


def speed_page(benchmarks: Path) -> str:
    """What `benchmarks/` measured of this part, a line each, from the JSON files that are there."""
    there = (path for path in (benchmarks / f"{name}.json" for name in _SPEED) if path.is_file())
    lines = [_SPEED[path.stem](read_object(path)) for path in there]
    return "\n".join(["## Speed", "", "Seconds are the processor's, of one core.", "", *lines, ""])


def _shared_line(found: dict[str, Any]) -> str:
    table = found["the whole table"]
    return (
        f"- `benchmarks/reproduce.py`: the extraction of table2a, {found['images']} images, is "
        f"{found['times as fast as separate']} times as fast as four of our own that end at their layer, "
        f"{found['times as fast as released']} times as four whole passes with the VAE again. The table took "
        f"{table['seconds, one training a layer']:g} s; its plan said "
        f"{table['seconds that the plan said']:g} s at {table['at TFLOP/s']} TFLOP/s."
    )


def _sd15_line(found: dict[str, Any]) -> str:
    return (
        f"- `benchmarks/reproduce.py`, {found['model']}, {found['images']} images: "
        f"{found['times as fast as separate']} times as fast as four of our own, "
        f"{found['times as fast as released']} times as four whole passes with the VAE again."
    )


def _step_line(found: dict[str, Any]) -> str:
    ratios = [row["times as fast as on-line"] for row in found["layers"].values()]
    span = f"{min(ratios)} to {max(ratios)}" if len(ratios) > 1 else f"{ratios[0]}"
    large = [
        value
        for name, value in found["layers"].get("up_ft1", {}).items()
        if "images a step" in name
    ]
    reckoned = "reckoned from a measured step of the head and the passes above"
    more = f", {large[0]} times with 16 images a step, {reckoned}" if large else ""
    (said,) = (value for name, value in found.items() if name.startswith("multiplications"))
    return (
        f"- `benchmarks/diffc_step.py`, {found['model']}, head of width {found['width']}: a step from stored "
        f"grids is {span} times as fast as on-line with {found['batch']} images a step{more} (by "
        f"multiplications of SD-1.5 at 512 px: {said['times as few as on-line']})."
    )


def _classifier_line(found: dict[str, Any]) -> str:
    staged, loop, gap = (found[name] for name in ("staged", "plain loop", "staged minus loop"))
    return (
        f"- `benchmarks/diffusion_classifier.py`: staged and batched, {found['times as fast']} times as fast "
        f"as the plain loop; {100 * staged['value']:.1f} and {100 * loop['value']:.1f} % of "
        f"{staged['images']} images, a difference of {percent(gap)} points; the same answer on "
        f"{found['agreement']:.0%}."
    )


def _advisor_line(found: dict[str, Any]) -> str:
    orders = found["order of equally cheap ones"]
    one, worst = orders["the advisor's"], orders["reversed"]
    same, within = one["same recommendation"], one["not told apart from the full grid's best"]
    best = one["points that the best of all has over the choice"]
    return (
        f"- `benchmarks/advisor.py`: {one['times as few passes']['mean']} times as few passes as the full "
        f"grid of {found['candidates']} candidates in {found['passes']} passes on {found['images']} images. "
        f"Both recommend the very same candidate in {percent(same)} % of {found['resamplings']} resamplings; "
        f"full grids of two resamplings in {one['full grids of two resamplings agree']:.0%}. In "
        f"{percent(within)} % the full grid does not tell the choice apart from its best. Over all images "
        f"the race loses {_points(one)} points against the full grid's choice; the best candidate is "
        f"{best['race']} points above the race's, {best['full grid']} above the full grid's, "
        f"{best['a candidate at random']} above one at random. Were equally cheap ones tried in the reverse "
        f"order, from the most noise on, the race would lose {_points(worst)}: on few images it believes "
        "that order."
    )


def _points(found: Mapping[str, Any]) -> str:
    value, low, high = (found["points lost on all images"][key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


_SPEED: dict[str, Callable[[dict[str, Any]], str]] = {
    "reproduce": _shared_line,
    "reproduce_sd15": _sd15_line,
    "diffusion_classifier": _classifier_line,
    "diffc_step": _step_line,
    "diffc_step_photo": _step_line,
    "diffc_step_sd15": _step_line,
    "advisor": _advisor_line,
}
