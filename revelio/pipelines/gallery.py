"""A gallery of the latents of a k-SAE over a store, made and written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.activations.store import WHOLE_GRIDS, ActivationStore
from revelio.analysis.config import MakeGalleryConfig, PurityConfig
from revelio.analysis.gallery.beside import opened
from revelio.analysis.gallery.told import told
from revelio.analysis.gallery.write import check_place, write_gallery
from revelio.analysis.purity import purity
from revelio.analysis.top_images import TopImages
from revelio.analysis.top_images_files import sources
from revelio.bounds import check_fields
from revelio.data.dataset import ImageDataset
from revelio.outputs import claimed
from revelio.pipelines import Report, counted, silent
from revelio.pipelines.inputs import check_same_source, made_from, open_sae, pictures_of, place_of
from revelio.pipelines.purity import controls_of
from revelio.pipelines.top_images import compute, read_top_images
from revelio.sae.model import KSparseAutoencoder

__all__ = ["MadeGallery", "MakeGalleryConfig", "make_gallery"]


@dataclass(frozen=True)
class MadeGallery:
    """A gallery's folder and what it shows.

    Attributes:
        path: open its `index.html` in a browser.
        latents: how many are shown.
        images: how many there are.
        missing: why a row of the store has no picture, by row.
        store: the store's manifest.
        top: the top images that it shows.
    """

    path: Path
    latents: int
    images: int
    missing: dict[str, str]
    store: dict[str, Any]
    top: TopImages


def make_gallery(
    config: MakeGalleryConfig,
    progress: Report = silent,
    *,
    dataset: ImageDataset | None = None,
    entry: dict[str, Any] | None = None,
) -> MadeGallery:
    """Write a gallery.

    Args:
        config: which store, k-SAE and pictures, how much to show, and where to write.
        progress: told how far it is.
        dataset: the pictures, where they are opened already.
        entry: the k-SAE's purity, where it is measured already.

    Raises:
        ValueError: a setting is outside its bounds, parts do not belong together, or the folder holds
            something else: also the gallery of another store or k-SAE.
    """
    check_fields(config)
    out = config.out or place_of(config.ksae, "gallery")
    check_place(out)
    with claimed(out):
        store = ActivationStore.open(config.store, instead=WHOLE_GRIDS)
        for path in config.beside:
            opened(path, store.ids)  # refused before the work
        pictures = dataset or pictures_of(config.data, store)
        model = open_sae(config.ksae, config.device, progress)
        ours, earlier = sources(model, store), out / "gallery.json"
        check_same_source(
            earlier, lambda found: made_from(found.get("made_from", {})), made_from(ours)
        )
        known = told(config.names, config.locality, ours["ksae"])
        if config.top is None:
            top = compute(config, store, model, progress)
        else:
            top = read_top_images(config.top, store, model)
        entry = entry or _purity(config, model, store, top, progress)
        count = counted(progress, "thumbnails", store.images, "image")
        summary = write_gallery(
            out,
            model,
            store,
            top,
            pictures,
            config,
            purity=entry,
            known=known,
            beside=config.beside,
            progress=count,
        )
    return MadeGallery(out, **summary, store=store.manifest, top=top)


def _purity(
    config: MakeGalleryConfig,
    model: KSparseAutoencoder,
    store: ActivationStore,
    top: TopImages,
    progress: Report,
) -> dict[str, Any] | None:
    """The purity of the latents, beside controls where there are labels; None of one image a latent."""
    if top.m < 2:
        return None
    how = PurityConfig(m=min(10, top.m), seed=config.seed)
    entry = purity(top, how)
    if config.beside_controls and top.labels is not None and entry["latents"]:
        entry |= controls_of(model, store, top, how, progress)
    return entry
