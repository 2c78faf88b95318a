"""The stages of the demo; each does what a user's own command does, by the same pipeline.

activations -> k-SAEs -> top images, purity -> gallery
grids -> Diff-C beside its baselines            diffc.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revelio.activations.config import ExtractConfig
from revelio.activations.extract import run as run_extraction
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.store import ActivationStore
from revelio.analysis.config import MakeGalleryConfig, MakeTopImagesConfig, MeasurePurityConfig
from revelio.backbones.base import Backbone
from revelio.data.dataset import ImageDataset
from revelio.pipelines import Report, counted, silent
from revelio.pipelines.demo.config import DemoConfig
from revelio.pipelines.demo.examples import examples
from revelio.pipelines.gallery import make_gallery
from revelio.pipelines.purity import measure_purity
from revelio.pipelines.top_images import make_top_images
from revelio.pipelines.train_sae import train_sae
from revelio.sae.config import TrainSAEConfig

# What a report has of each k-SAE.
TRAINED = ("d", "n", "k", "fvu", "l0", "dead_share")


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
        rows.append(_cell(store) | {name: made.report[name] for name in TRAINED})
        told(1)
    return rows


def _cell(store: Path) -> dict[str, Any]:
    manifest = ActivationStore.open(store).manifest
    return {"layer": manifest["layer"], "timestep": manifest.get("timestep")}


def measure(
    config: DemoConfig, stores: Sequence[Path], saes: Path, progress: Report
) -> list[dict[str, Any]]:
    """The purity entry of every store's k-SAE, beside its controls where the images have labels."""
    told, entries = counted(progress, "purity and controls", len(stores), "k-SAE"), []
    for store in stores:
        ksae = saes / store.name
        top = MakeTopImagesConfig(store=store, ksae=str(ksae), m=config.m, mode=config.sae.mode)
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
        entries.append(_report_row(found.entries[0]) | _cell(store))
        told(1)
    return entries


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
    """The layer and timestep that the gallery shows: the highest majority share; without labels the first.

    Similarities of layers of different widths say nothing of which knows more.
    """
    known = [entry for entry in entries if entry["majority_share"] is not None]
    return max(known, key=lambda entry: entry["majority_share"]) if known else entries[0]
