"""A gallery of latents: one folder of pages that opens from disk, without a server or a network.

Latents sorted and filtered by purity, density, strength and class; their top images; every image with its
active latents; a map of the latents.

    revelio gallery --store runs/pets/up_ft1-t25-empty-d0 --ksae runs/ksae/final --out runs/gallery
    revelio gallery --store S --ksae K --top runs/top --data.source ~/pictures --latents 2000

Open index.html of the folder in a browser.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from revelio.bounds import Count, Device, Folder, OutFolder, Pixels, Seed
from revelio.data.config import DataConfig
from revelio.trust import printable

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.analysis.top_images import TopImages
    from revelio.data.dataset import ImageDataset
    from revelio.sae.model import KSparseAutoencoder

FROM_STORE = "from-store"


@dataclass(frozen=True)
class Config:
    """Which latents to show of which images."""

    store: Folder
    """The activation store."""

    ksae: str
    """The k-SAE: a folder or a hub id."""

    out: OutFolder = Path("runs/gallery")
    """The folder to write; the files of an older gallery there are replaced."""

    top: Folder | None = None
    """Top images that `revelio top-images` made of this store and k-SAE; none: they are made now."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source=FROM_STORE))
    """The pictures; from-store: the known data set that the store's manifest names. Matched by id."""

    latents: Count = 1000
    """The strongest so many latents."""

    m: Count = 20
    """Top images shown for each latent, where they are made now."""

    map_by: Literal["decoder", "labels"] = "decoder"
    """What the map is laid out by: decoder directions, or the classes of the top images."""

    map_method: Literal["tsne", "pca"] = "tsne"
    """How the map is laid out."""

    title: str | None = None
    """The heading; none: the data set, layer and timestep."""

    thumbnail: Pixels = 192
    """Side of the thumbnails, in pixels."""

    seed: Seed = 0
    """Seed of the map and of the chance levels."""

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `mps`."""


def run(config: Config) -> None:
    """Write the gallery."""
    from revelio.analysis.gallery import check_place
    from revelio.outputs import claimed

    check_place(config.out)
    with claimed(config.out):
        _write(config)


def _write(config: Config) -> None:
    from functools import partial

    from tqdm import tqdm

    from revelio.activations.store import ActivationStore
    from revelio.analysis.gallery import write_gallery
    from revelio.analysis.gallery_data import GallerySettings
    from revelio.analysis.purity import purity
    from revelio.cli.top_images import load_ksae

    store = ActivationStore.open(config.store)
    dataset = open_pictures(config.data, store)
    model = load_ksae(config.ksae, config.device)
    top = _top(config, store, model)
    with tqdm(total=len(store), unit="image", desc="thumbnails") as bar:
        summary = write_gallery(
            config.out,
            model,
            store,
            top,
            dataset,
            GallerySettings(
                latents=config.latents,
                map_by=config.map_by,
                map_method=config.map_method,
                seed=config.seed,
            ),
            title=config.title,
            purity=purity(top, images=min(10, top.m), seed=config.seed) if top.m > 1 else None,
            thumbnail=config.thumbnail,
            progress=partial(_advance, bar),
        )
    _report(config.out, summary)
    print(_next(config, store))


def _next(config: Config, store: "ActivationStore") -> str:
    """The classifier on the layer that the gallery shows."""
    from revelio.following import beside, flags, following

    made = store.manifest
    source = made.get("dataset") if config.data.source == FROM_STORE else config.data.source
    data = [*flags(config.data, "data", "root"), "--data.source", source or "FOLDER"]
    backbone = ["--backbone.name", made.get("model") or "BACKBONE"]
    layer = ["--layer", made["layer"], "--timestep", made.get("timestep")]
    return following("train-diffc", *data, *backbone, *layer, "--out", beside(config.out, "diffc"))


def _advance(bar: Any, count: int) -> None:
    if not bar.n:
        bar.unpause()  # the rate is that of the thumbnails, not of the map made before them
    bar.update(count)


def _report(out: Path, summary: dict[str, Any]) -> None:
    missing = summary["missing"]
    for reason in list(missing.values())[:10]:
        print(f"no picture: {printable(reason)}")
    if len(missing) > 10:
        print(f"... and {len(missing) - 10:,} more without a picture, listed in gallery.json")
    print(f"{summary['latents']:,} latents, {summary['images']:,} images")
    print(f"wrote {out}: open {out / 'index.html'} in a browser")


def _top(config: Config, store: "ActivationStore", model: "KSparseAutoencoder") -> "TopImages":
    from revelio.analysis.top_images_files import check_ksae, check_store, load_top_images
    from revelio.cli import top_images

    if config.top is not None:
        top = load_top_images(config.top)
        check_store(top, store)
        check_ksae(top, model)
        return top
    settings = top_images.Config(store=config.store, ksae=config.ksae, m=config.m)
    return top_images.compute(settings, store, model)


def open_pictures(options: DataConfig, store: "ActivationStore") -> "ImageDataset":
    """The data set that the options name, or the one that the store was made from.

    Raises:
        ValueError: the store does not say where its images are, or they are not there.
    """
    from dataclasses import replace

    from revelio.cli.options import build_dataset
    from revelio.data.registry import is_registered

    if options.source != FROM_STORE:
        return build_dataset(options)
    recorded = store.manifest.get("dataset")
    # A folder's bare name says nothing of where it is; a path or a hub id is nothing that Revelio writes,
    # and would have a store that somebody else made pick the pictures that are read here.
    if not recorded or not is_registered(recorded):
        raise ValueError(
            f"{store.path} does not say where its images ({recorded}) are: give --data.source"
        )
    split = options.split or store.manifest.get("split")
    try:
        return build_dataset(replace(options, source=str(recorded), split=split))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the store's images ({recorded}) can't be opened: give --data.source ({error})"
        ) from error
