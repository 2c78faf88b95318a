"""The stages of the demo, each a function of its inputs that writes its files under the run directory.

activations -> k-SAEs -> purity -> gallery;   grids -> Diff-C beside its baselines
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from revelio.activations.extract import run as run_extraction
from revelio.activations.job import Extraction
from revelio.activations.recipe import Recipe
from revelio.activations.sources import Reading
from revelio.activations.store import ActivationStore
from revelio.analysis.gallery import thumbnail_path, write_gallery
from revelio.analysis.gallery_data import GallerySettings
from revelio.analysis.purity import eligible, latent_measures, purity
from revelio.analysis.similarity import unit_vectors
from revelio.analysis.top_images import TopImages, top_images
from revelio.analysis.top_images_files import with_source
from revelio.backbones.base import Backbone
from revelio.data.dataset import ImageDataset
from revelio.diffc.fit import fit
from revelio.runs import write_whole_by
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder, Mode
from revelio.sae.state import TrainSettings
from revelio.sae.train import train


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does; every value is in the report.

    Attributes:
        mode: of the k-SAEs.
        layers: of the backbone.
        timesteps: for the purity table; empty for a backbone without noise.
        diffc_timestep: for Diff-C; None for a backbone without noise.
        seed: of everything random.
        batch_size: images a pass of the backbone.
        k: active latents an image.
        expansion: latents a dimension.
        steps: of each k-SAE.
        ksae_batch: activations a step.
        learning_rate: of the k-SAEs, after a tenth of the steps as warm-up.
        top: images a latent is judged by.
        width: of Diff-C.
        epochs: of Diff-C.
    """

    mode: Mode
    layers: tuple[str, ...]
    timesteps: tuple[int, ...]
    diffc_timestep: int | None
    seed: int
    batch_size: int
    k: int
    expansion: int
    steps: int
    ksae_batch: int
    learning_rate: float
    top: int
    width: int
    epochs: int


def extract_with_bar(
    title: str,
    dataset: ImageDataset,
    backbone: Backbone,
    out: Path,
    recipe: Recipe,
    batch_size: int,
    on_error: Literal["stop", "skip"],
    mode: str,
) -> list[Path]:
    """Extract into ``out``, going on where an interrupted run stopped; shows images/s and time left."""
    job = Extraction(
        dataset,
        backbone,
        out,
        recipe,
        reading=Reading(batch_size, 0, on_error),
        provenance={"mode": mode},
        resume=True,
    )
    done = 0
    with tqdm(desc=title, total=len(dataset), unit="image") as bar:
        for progress in run_extraction(job):
            bar.total = progress.total
            bar.update(progress.images - done)
            done = progress.images
    return job.stores


def train_ksae(store: ActivationStore, folder: Path, settings: DemoSettings) -> KSparseAutoencoder:
    """Train a k-SAE on a store and save it; a saved one is loaded instead."""
    if folder.exists():
        return KSparseAutoencoder.from_pretrained(folder)
    rows = store.tensor()
    d = rows.shape[1]
    source = {key: store.manifest.get(key) for key in ("model", "dataset", "layer", "timestep")}
    n = d * settings.expansion
    model = KSparseAutoencoder(d, n, min(settings.k, n), settings.mode, trained_on=source)
    how = TrainSettings(
        steps=settings.steps,
        batch_size=settings.ksae_batch,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.steps // 10,
        seed=settings.seed,
    )
    for _ in train(model, rows, how):
        pass
    write_whole_by(folder, lambda temporary: model.save_pretrained(temporary))
    return model


def ksae_stage(
    stores: Sequence[ActivationStore], out: Path, settings: DemoSettings
) -> list[dict[str, Any]]:
    """Train one k-SAE a store; its reconstruction and sparsity, measured on the sparse codes."""
    rows = []
    for store in tqdm(stores, desc="k-SAEs", unit="k-SAE"):
        model = train_ksae(store, out / store.path.name, settings)
        found = evaluate(model, (batch for _, batch in store.batches(1024)))
        rows.append(
            _cell(store)
            | {"d": model.d, "n": model.n, "k": model.k}
            | {"fvu": found.fvu, "l0": found.l0, "dead_share": found.dead_share}
        )
    return rows


def _cell(store: ActivationStore) -> dict[str, Any]:
    return {"layer": store.manifest["layer"], "timestep": store.manifest.get("timestep")}


def purity_stage(
    stores: Sequence[ActivationStore], ksaes: Path, settings: DemoSettings
) -> list[dict[str, Any]]:
    """The purity entry of every store's k-SAE."""
    entries = []
    for store in tqdm(stores, desc="purity", unit="k-SAE"):
        entry = purity(
            cell_top_images(store, ksaes, settings),
            images=settings.top,
            seed=settings.seed,
            embeddings=unit_vectors(store, store.ids, centre=True),
        )
        entries.append(_report_row(entry) | _cell(store))
    return entries


def cell_top_images(store: ActivationStore, ksaes: Path, settings: DemoSettings) -> TopImages:
    """The top images of the k-SAE of a store."""
    model = KSparseAutoencoder.from_pretrained(ksaes / store.path.name)
    top = top_images(model, store, m=settings.top, mode=settings.mode)
    return with_source(top, model, store)


def _report_row(entry: dict[str, Any]) -> dict[str, Any]:
    """A purity entry with every key of the report; measures that need labels are None without."""
    needed = ("sigma_label", "chance", "majority_share", "entropy", "null_z", "same_class_pairs")
    needed += ("similarity", "similarity_chance")
    row = {key: None for key in needed} | entry
    row["majority_share_chance"] = entry.get("chance_levels", {}).get("majority_share")
    # One interval a measure, under the name that the report gives the measure.
    row["interval"] = row.pop("intervals", None)
    return row


def best_cell(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layer and timestep that know most: by majority share, or similarity above its chance."""

    def score(entry: dict[str, Any]) -> float:
        if entry["majority_share"] is not None:
            return entry["majority_share"]
        return (entry.get("similarity") or 0.0) - (entry.get("similarity_chance") or 0.0)

    return max(entries, key=score)


def gallery_stage(
    store: ActivationStore,
    dataset: ImageDataset,
    out: Path,
    ksaes: Path,
    entry: dict[str, Any],
    settings: DemoSettings,
) -> list[dict[str, Any]]:
    """Write the gallery of one cell; give a few of its latents for the report."""
    model = KSparseAutoencoder.from_pretrained(ksaes / store.path.name)
    top = cell_top_images(store, ksaes, settings)
    with tqdm(desc="gallery", total=len(store), unit="image") as bar:
        write_gallery(
            out / "gallery",
            model,
            store,
            top,
            dataset,
            GallerySettings(),
            purity=entry | {"interval": (entry["interval"] or {}).get("sigma_label")},
            progress=bar.update,
        )
    return examples(top, settings.top)


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
        "note": f"active on {int(top.counts[latent])} images",
        "images": [
            {
                "src": f"gallery/{thumbnail_path(row)}",
                "label": names[int(top.labels[row])] if names and top.labels is not None else "",
            }
            for row in rows
        ],
    }


def diffc_stage(
    trained: Callable[[str], tuple[ActivationStore, ActivationStore]],
    random: Callable[[str], tuple[ActivationStore, ActivationStore]] | None,
    pixels: tuple[ActivationStore, ActivationStore],
    settings: DemoSettings,
) -> list[dict[str, Any]]:
    """Diff-C on every layer's grids, on those of random weights, and on raw pixels.

    Args:
        trained: the (train, test) grid stores of a layer.
        random: the same of the architecture with random weights, or None where there is none.
        pixels: the (train, test) stores of the pictures themselves.
        settings: of the demo.
    """
    baseline = _accuracy(*pixels, settings)
    rows = []
    for layer in tqdm(settings.layers, desc="Diff-C", unit="layer"):
        found = _accuracy(*trained(layer), settings)
        other = _accuracy(*random(layer), settings) if random is not None else None
        rows.append(
            {"layer": layer, "timestep": settings.diffc_timestep}
            | _percent("", found)
            | _percent("pixels_", baseline)
            | _percent("random_weights_", other)
            | {"parameters": found["parameters"], "interval_kind": found["interval_kind"]}
        )
    return rows


def _percent(prefix: str, found: dict[str, Any] | None) -> dict[str, Any]:
    """Top-1 and its interval in percent, as the paper's tables have them; None where not measured."""
    if found is None:
        return {f"{prefix}top1": None, f"{prefix}interval": None}
    return {
        f"{prefix}top1": 100 * found["top1"],
        f"{prefix}interval": [100 * bound for bound in found["interval"]],
    }


def _accuracy(
    train_store: ActivationStore, test_store: ActivationStore, settings: DemoSettings
) -> dict[str, Any]:
    assert train_store.labels is not None and test_store.labels is not None
    return fit(
        train_store.tensor(),
        train_store.labels,
        test_store.tensor(),
        test_store.labels,
        classes=train_store.classes,
        width=settings.width,
        epochs=settings.epochs,
        batch_size=32,
        learning_rate=1e-3,
        seed=settings.seed,
    )
