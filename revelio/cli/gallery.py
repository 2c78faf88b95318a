"""A gallery of latents: one folder of pages that opens from disk, without a server or a network.

Latents sorted and filtered by purity, density, strength and class; their top images; every image with its
active latents; a map of the latents.

    revelio gallery --store runs/pets/up_ft1-t25-empty-d0 --ksae runs/ksae
    revelio gallery --store S --ksae K --top runs/ksae/top-images --data.source ~/pictures --latents 2000

Open index.html of the folder in a browser.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from revelio.analysis.config import FROM_STORE
from revelio.analysis.config import MakeGalleryConfig as Config
from revelio.wording import plural

if TYPE_CHECKING:
    from revelio.pipelines.gallery import MadeGallery


def run(config: Config) -> None:
    """Write the gallery, and name the images that have no picture."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.gallery import make_gallery

    with Bar("gallery") as bar:
        made = make_gallery(config, bar)
    for reason in list(made.missing.values())[:10]:
        print(f"no picture: {reason}")
    if len(made.missing) > 10:
        print(f"... and {len(made.missing) - 10:,} more without a picture, listed in gallery.json")
    print(f"{plural(made.latents, 'latent')}, {plural(made.images, 'image')}")
    print(f"wrote {made.path}: open {made.path / 'index.html'} in a browser")
    if (
        made.store.get("prompt_policy", "empty") == "empty"
    ):  # a picture that is dropped in has no prompt
        print(_served(config, made))
    print(_next(config, made))


def _served(config: Config, made: "MadeGallery") -> str:
    """The gallery as a server that takes pictures; what it finds by itself is left out."""
    from revelio.backbones.registry import describe
    from revelio.cli.pictures import model_of
    from revelio.following import following
    from revelio.hub import FINAL

    run = made.path.resolve().parent
    within = (run / FINAL).is_dir() and Path(config.ksae).resolve() in (run, run / FINAL)
    ksae = [] if within else ["--ksae", config.ksae]
    backbone = model_of(config.store, made.store.get("model"))
    found = [["--backbone.name", known.name] for known in describe()]
    return following("serve", made.path, *ksae, *([] if backbone in found else backbone))


def _next(config: Config, made: "MadeGallery") -> str:
    """The classifier on the layer that the gallery shows; without labels, which it needs, its PCA maps."""
    from revelio.cli.pictures import WHERE, extracted_from, model_of
    from revelio.following import beside, flags, following

    store, data = made.store, config.data
    told = extracted_from(config.store)
    if data.source == FROM_STORE:
        data = replace(told or data, source=store.get("dataset") or "FOLDER")
    elif told is not None and data.labels is None and data.label_column is None:
        # The labels are the store's, and a gallery is given its pictures without them.
        data = replace(data, labels=told.labels, label_column=told.label_column)
    pictures = [*flags(data, "data", *WHERE), "--data.source", data.source]
    backbone = model_of(config.store, store.get("model"))
    timestep = store.get("timestep")
    if made.top.labels is None:
        layer = [
            "--layers",
            store["layer"],
            "--timesteps",
            *([] if timestep is None else [timestep]),
        ]
        out = beside(made.path, "pca-maps")
        return following("pca-maps", *pictures, *backbone, *layer, "--out", out)
    layer = ["--layer", store["layer"], "--timestep", timestep]
    return following(
        "train-diffc", *pictures, *backbone, *layer, "--out", beside(made.path, "diffc")
    )
