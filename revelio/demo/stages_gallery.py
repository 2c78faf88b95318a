"""The demo's gallery of the best cell, and a few of its latents for the report."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from revelio.activations.store import ActivationStore
from revelio.analysis.gallery import thumbnail_path, write_gallery
from revelio.analysis.gallery_data import GallerySettings
from revelio.analysis.purity import eligible, latent_measures
from revelio.analysis.top_images import TopImages
from revelio.data.dataset import ImageDataset
from revelio.demo.stages import DemoSettings, cell_top_images, load_ksae


def gallery_stage(
    store: ActivationStore,
    dataset: ImageDataset,
    out: Path,
    ksaes: Path,
    entry: dict[str, Any],
    settings: DemoSettings,
) -> list[dict[str, Any]]:
    """Write the gallery of one cell; give a few of its latents for the report."""
    model = load_ksae(ksaes / store.path.name)
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
