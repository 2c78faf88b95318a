"""The stages of the demo; each does what a user's own command does, by the same pipeline.

pictures: a training part for k-SAEs and Diff-C, a held-out part that judges them
activations -> k-SAEs -> top images, purity                  of every layer and timestep
grids -> a k-SAE of cells -> purity, gallery, controls       of the purest, cells.py
grids -> Diff-C beside its baselines                         diffc.py
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from revelio.activations.config import ExtractConfig
from revelio.activations.extract import run as run_extraction
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.store import ActivationStore
from revelio.analysis.config import MakeGalleryConfig, MakeTopImagesConfig, MeasurePurityConfig
from revelio.analysis.gallery.write import thumbnail_path
from revelio.analysis.purity import eligible, latent_measures
from revelio.analysis.top_images import TopImages
from revelio.backbones.base import Backbone
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.data.registry import is_registered
from revelio.data.splits import stratified_split
from revelio.pipelines import Report, counted, silent
from revelio.pipelines.demo.config import DemoConfig
from revelio.pipelines.gallery import make_gallery
from revelio.pipelines.purity import measure_purity
from revelio.pipelines.top_images import make_top_images
from revelio.pipelines.train_sae import train_sae
from revelio.sae.config import Mode, TrainSAEConfig
from revelio.wording import plural

# What a report has of each k-SAE.
TRAINED = ("d", "n", "k", "fvu", "l0", "dead_share")
HELD_OUT = 0.2


def demo_images(config: DemoConfig) -> tuple[ImageDataset, ImageDataset | None]:
    """Open the demo's pictures: for training, and held out.

    A known data set has its own train and test split. Of anything else a fifth of every class is held out,
    keyed by the seed. Where there are no labels nothing is held out: there is nothing to classify.

    Raises:
        ValueError: the source is not there, empty or unreadable.
    """
    data = config.data
    if is_registered(data.source) and data.split is None:
        train, test = (open_dataset(replace(data, split=split)) for split in ("train", "test"))
        return train.spread(config.train_images), test.spread(config.test_images)
    whole = open_dataset(data)
    if whole.labels is None:
        return whole.spread(config.train_images), None
    kept, held = stratified_split(whole.labels, HELD_OUT, config.seed, "demo", "held out")
    if not held:
        return whole.spread(config.train_images), None
    train, test = whole.subset(kept), whole.subset(held)
    return train.spread(config.train_images), test.spread(config.test_images)


def extract(
    title: str,
    dataset: ImageDataset,
    backbone: Backbone,
    out: Path,
    config: ExtractConfig,
    progress: Report,
) -> None:
    """Extract into ``out``, going on where an interrupted run stopped."""
    plan = ExtractionPlan(
        dataset, backbone, out, config, provenance={"mode": config.mode}, resume=True
    )
    told, done = counted(progress, title, len(dataset), "image"), 0
    for step in run_extraction(plan):
        told(step.images - done)
        done = step.images


def train_saes(
    config: DemoConfig, stores: Sequence[Path], out: Path, progress: Report
) -> list[dict[str, Any]]:
    """Train one k-SAE a store; its reconstruction and sparsity, measured on the sparse codes."""
    told, rows = counted(progress, "k-SAEs", len(stores), "k-SAE"), []
    for store in stores:
        run = TrainSAEConfig(**vars(config.sae), store=(store,), out=out / store.name, resume=True)
        (made,) = train_sae(run, silent)
        rows.append(place_of_store(store) | {name: made.report[name] for name in TRAINED})
        told(1)
    return rows


def place_of_store(store: Path) -> dict[str, Any]:
    """The layer and timestep of a store, as rows of the report have them."""
    manifest = ActivationStore.open(store).manifest
    return {"layer": manifest["layer"], "timestep": manifest.get("timestep")}


def measure(
    config: DemoConfig, stores: Sequence[Path], saes: Path, progress: Report
) -> list[dict[str, Any]]:
    """The purity entry of every store's k-SAE, beside its controls where the images have labels."""
    told, entries = counted(progress, "purity and controls", len(stores), "k-SAE"), []
    for store in stores:
        entries.append(judged_top(config, store, saes / store.name, config.sae.mode))
        told(1)
    return entries


def judged_top(config: DemoConfig, store: Path, ksae: Path, mode: Mode) -> dict[str, Any]:
    """The purity of a k-SAE's latents by their top images in a store."""
    top = MakeTopImagesConfig(store=store, ksae=str(ksae), m=config.m, mode=mode)
    found = measure_purity(
        MeasurePurityConfig(
            top=(make_top_images(top).path,),
            store=(store,),
            ksae=(str(ksae),),
            m=config.m,
            seed=config.seed,
            similarity=True,
        )
    )
    return _report_row(found.entries[0]) | place_of_store(store)


def _report_row(entry: dict[str, Any]) -> dict[str, Any]:
    """A purity entry with every key of the report; measures that need labels are None without."""
    needed = ("sigma_label", "chance", "majority_share", "entropy", "null_z", "same_class_pairs")
    needed += ("similarity", "similarity_chance")
    row = {key: None for key in needed} | entry
    row["majority_share_chance"] = entry.get("chance_levels", {}).get("majority_share")
    # One interval a measure, under the name that the report gives the measure.
    row["interval"] = row.pop("intervals", None)
    return row


def show(
    config: DemoConfig,
    store: Path,
    ksae: Path,
    dataset: ImageDataset,
    entry: dict[str, Any],
    out: Path,
    progress: Report,
) -> list[dict[str, Any]]:
    """Write the gallery of one k-SAE; give a few of its latents for the report."""
    made = make_gallery(
        MakeGalleryConfig(
            store=store, ksae=str(ksae), top=ksae / "top-images", seed=config.seed, out=out
        ),
        progress,
        dataset=dataset,
        entry=entry | {"interval": (entry["interval"] or {}).get("sigma_label")},
    )
    return examples(made.top, config.m)


def shown_cell(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layer and timestep whose cells the gallery shows: the purest of which that is sure.

    It is the highest lower end of the majority share's interval: the highest share may be of a handful of
    latents. Without labels it is the first: similarities of layers of different widths say nothing of which
    knows more.
    """
    known = [entry for entry in entries if entry["majority_share"] is not None]
    return max(known, key=lambda one: one["interval"]["majority_share"][0]) if known else entries[0]


def examples(top: TopImages, images: int, count: int = 12) -> list[dict[str, Any]]:
    """Strong latents for the report: the purest of each class, or simply the strongest."""
    strongest = eligible(top, images)[:200]
    if top.labels is None or not len(strongest):
        return [_example(top, int(latent), images) for latent in strongest[:count]]
    share = latent_measures(top, strongest, images)["majority"]
    shown, seen = [], set[int]()
    for place in torch.sort(share, descending=True, stable=True).indices.tolist():
        latent = int(strongest[place])
        label = int(top.labels[top.indices[latent, :images]].mode().values)
        if label not in seen and len(shown) < count:
            seen.add(label)
            same = round(float(share[place]) * images)
            note = f"{same} of {images} are {top.classes[label]}"
            shown.append(_example(top, latent, images) | {"note": note})
    return shown


def _example(top: TopImages, latent: int, images: int) -> dict[str, Any]:
    rows = [row for row in top.indices[latent, :images].tolist() if row >= 0]
    names = top.classes if top.labels is not None else ()
    return {
        "latent": latent,
        "strongest": round(float(top.values[latent, 0]), 3),
        "note": f"active on {plural(int(top.counts[latent]), 'image')}",
        "images": [
            {
                "src": f"gallery/{thumbnail_path(row)}",
                "label": names[int(top.labels[row])] if names and top.labels is not None else "",
            }
            for row in rows
        ],
    }
