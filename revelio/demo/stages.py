"""The stages of the demo, each a function of its inputs that writes its files under the run directory.

activations -> k-SAEs -> purity       here
                      -> gallery      stages_gallery.py
grids -> Diff-C beside its baselines  stages_diffc.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from revelio.activations.config import ExtractConfig
from revelio.activations.extract import run as run_extraction
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.activations.store import ActivationStore
from revelio.analysis.controls import compare
from revelio.analysis.purity import purity
from revelio.analysis.similarity import unit_vectors
from revelio.analysis.top_images import TopImages, top_images
from revelio.analysis.top_images_files import with_source
from revelio.backbones.base import Backbone
from revelio.data.dataset import ImageDataset
from revelio.run_dir import write_folder
from revelio.sae.config import Mode, TrainConfig
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder
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
    title: str, dataset: ImageDataset, backbone: Backbone, out: Path, config: ExtractConfig
) -> list[Path]:
    """Extract into ``out``, going on where an interrupted run stopped; shows images/s and time left."""
    job = ExtractionPlan(
        dataset, backbone, out, config, provenance={"mode": config.mode}, resume=True
    )
    done = 0
    with tqdm(desc=title, total=len(dataset), unit="image") as bar:
        for progress in run_extraction(job):
            bar.total = progress.total
            bar.update(progress.images - done)
            done = progress.images
    return job.stores


def train_ksae(store: ActivationStore, folder: Path, settings: DemoSettings) -> KSparseAutoencoder:
    """The k-SAE of a store, trained and saved first where it is not there yet."""
    if folder.exists():
        return load_ksae(folder)
    rows = store.tensor()
    d = rows.shape[1]
    source = {key: store.manifest.get(key) for key in ("model", "dataset", "layer", "timestep")}
    n = d * settings.expansion
    model = KSparseAutoencoder(d, n, min(settings.k, n), settings.mode, trained_on=source)
    how = TrainConfig(
        steps=settings.steps,
        batch_size=settings.ksae_batch,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.steps // 10,
        seed=settings.seed,
    )
    for _ in train(model, rows, how):
        pass
    write_folder(folder, lambda temporary: model.save_pretrained(temporary))
    return load_ksae(folder)


def load_ksae(folder: Path) -> KSparseAutoencoder:
    """A saved k-SAE, with the fastest kernel there is."""
    model = KSparseAutoencoder.from_pretrained(folder)
    model.kernel = fastest_kernel(model)
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
    """The purity entry of every store's k-SAE, beside its controls where the images have labels."""
    entries = []
    for store in tqdm(stores, desc="purity and controls", unit="k-SAE"):
        entry = purity(
            cell_top_images(store, ksaes, settings),
            images=settings.top,
            seed=settings.seed,
            embeddings=unit_vectors(store, store.ids, centre=True),
        )
        if store.labels is not None and entry["latents"]:
            found = compare(
                load_ksae(ksaes / store.path.name), store, images=settings.top, seed=settings.seed
            )
            entry |= {name: found[name] for name in ("controls", "verdict")}
            entry["controls_method"] = found["interval_method"]
        entries.append(_report_row(entry) | _cell(store))
    return entries


def cell_top_images(store: ActivationStore, ksaes: Path, settings: DemoSettings) -> TopImages:
    """The top images of the k-SAE of a store."""
    model = load_ksae(ksaes / store.path.name)
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
