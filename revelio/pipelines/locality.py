"""How local, stable and distinct the latents of a k-SAE of cells are, measured and written as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from revelio.activations.encode import grids_as_stored
from revelio.activations.store import WHOLE_GRIDS, ActivationStore
from revelio.analysis.cells import encode_grid
from revelio.analysis.config import LocalityConfig, TopImagesConfig
from revelio.analysis.locality import (
    Firings,
    agreement,
    firings,
    flipped,
    locality,
    mask_iou,
    overlap,
    timestep_profile,
)
from revelio.analysis.redundancy import partners, redundancy
from revelio.analysis.top_images import top_images
from revelio.analysis.top_images_files import ksae_identity, store_identity
from revelio.backbones.base import Backbone
from revelio.backbones.registry import load_backbone
from revelio.bounds import check_fields
from revelio.config import to_plain
from revelio.data.picture import decoded
from revelio.data.transforms import Crop
from revelio.outputs import check_file, check_same_settings, has_keys
from revelio.pipelines import Made, Report, counted, silent
from revelio.pipelines.inputs import (
    backbone_of,
    check_same_source,
    open_sae,
    pictures_of,
    place_of,
)
from revelio.pipelines.sae_rows import open_stores
from revelio.run_dir import versions, write_json
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import path_in, printable

__all__ = ["LocalityConfig", "measure_locality", "read_masks"]

BATCH = 8
# What tells stores of the same activations apart, by what they differ in.
SAME = ("model", "layer", "prompt_policy", "dataset_sha256")


def measure_locality(config: LocalityConfig, progress: Report = silent) -> Made:
    """Measure the strongest latents, and write the result.

    Args:
        config: which latents, on which stores, and what else is given.
        progress: told how many images are done.

    Raises:
        ValueError: a setting is outside its bounds, stores are not of the same images or hold no grids, masks
            do not match, or something else, or a result of other settings, stands at the file to write.
    """
    check_fields(config)
    out = config.out or place_of(config.ksae, "locality.json")
    config = replace(config, out=out)
    check_file(out, has_keys("locality", "made_from"), "a result of locality")
    for path in config.store:
        _check_grids(ActivationStore.open(path, cells=True))
    stores = open_stores(config.store, "cells")
    _check_same(stores)
    store, model = stores[0], open_sae(config.ksae, config.device, progress)
    told = counted(progress, "top images", store.images, "image")
    device = next(model.parameters()).device
    made = {"ksae": ksae_identity(model), "stores": [store_identity(one) for one in stores]}

    def check() -> None:
        check_same_source(out, lambda found: _sources(found["made_from"]), _sources(made))
        check_same_settings(out, config)

    check()
    top = top_images(model, store, TopImagesConfig(over="max"), device=device, progress=told)
    latents = top.ranking(config.latents)
    if not len(latents):
        raise ValueError(f"no latent of {printable(config.ksae)} fires on {store.path}")
    backbone = _own_backbone(config, store) if config.moved else None
    found = [firings(model, one, latents, config.limit) for one in stores]
    result: dict[str, Any] = {
        "made_from": made,
        "latents": latents.tolist(),
        "images": found[0].count,
        "grid": list(found[0].grid),
        "locality": locality(found[0], seed=config.seed),
        "redundancy": redundancy(model, top, config.redundant_among),
        **_of_other_stores(stores, found, config.seed),
    }
    if config.masks is not None:
        crop = Crop.of(store.manifest)
        masks = read_masks(config.masks, store.ids[: found[0].count], found[0].grid, crop)
        result["masks"] = mask_iou(found[0], masks, seed=config.seed)
    if config.other is not None:
        result["partners"] = partners(model, open_sae(config.other), latents)
    if backbone is not None:
        result["moved"] = _moved(config, backbone, model, store, latents, found[0].maps(), progress)
    check()  # another run may have ended meanwhile
    write_json(out, result | {"config": to_plain(config), "versions": versions()})
    return Made(out, result)


def _sources(made_from: Mapping[str, Any]) -> list[Any]:
    """Which k-SAE and which first store, whose timestep and draw the others are compared with."""
    return [one.get("sha256") for one in (made_from["ksae"], made_from["stores"][0])]


def _check_grids(store: ActivationStore) -> None:
    if len(store.row_shape) != 3:
        cells = "one vector an image" if store.cells is None else "some cells of each grid"
        raise ValueError(f"{store.path} holds {cells}: {WHOLE_GRIDS}")


def _check_same(stores: Sequence[ActivationStore]) -> None:
    """Refuse stores of other images or layers than the first's.

    Raises:
        ValueError: one is; it is named.
    """
    first = stores[0]
    for store in stores:
        for name in SAME:
            if store.manifest.get(name) != first.manifest.get(name):
                raise ValueError(
                    f"{store.path} and {first.path} differ in `{name}`: give stores of the same images and "
                    "layer"
                )
        if store.row_shape != first.row_shape or store.images != first.images:
            raise ValueError(f"{store.path} and {first.path} are not of the same grids and images")


def _of_other_stores(
    stores: Sequence[ActivationStore], found: Sequence[Firings], seed: int
) -> dict[str, Any]:
    """The timestep profile, and the agreement with other draws of the first store's timestep."""
    about = [(store.manifest.get("timestep"), store.manifest.get("draw")) for store in stores]
    timestep, draw = about[0]
    profile = {int(t or 0): one for (t, d), one in zip(about, found, strict=True) if d == draw}
    draws = [one for (t, d), one in zip(about, found, strict=True) if t == timestep and d != draw]
    entry: dict[str, Any] = {}
    if len(profile) > 1:
        entry["timesteps"] = timestep_profile(dict(sorted(profile.items())), seed=seed)
    if draws:
        ours = found[0].maps()
        entry["draws"] = [agreement(ours, other.maps(), seed=seed) for other in draws]
    return entry


def _own_backbone(config: LocalityConfig, store: ActivationStore) -> Backbone:
    """The model that made the store's grids.

    Raises:
        ValueError: it is another, or saw prompts, which moved images have none of.
    """
    about = store.manifest
    asked = backbone_of(config.backbone, about, f"{store.path}")
    backbone = load_backbone(asked, layers=[about["layer"]])
    if backbone.name != about.get("model") or about.get("prompt_policy") not in (None, "empty"):
        raise ValueError(
            f"{store.path} is of {about.get('model')} under prompts {about.get('prompt_policy')}, the "
            f"backbone is {backbone.name}: moved images need the store's own model, and the empty prompt"
        )
    return backbone


def _moved(
    config: LocalityConfig,
    backbone: Backbone,
    model: KSparseAutoencoder,
    store: ActivationStore,
    latents: Int64[Tensor, " l"],
    maps: Float[Tensor, "b l h w"],
    progress: Report,
) -> dict[str, Any]:
    """How maps agree once the image was mirrored or shifted and the map moved back."""
    about = store.manifest
    dataset, ids = pictures_of(config.data, store), store.ids[: len(maps)]
    place = {name: index for index, name in enumerate(dataset.ids)}
    if missing := [name for name in ids if name not in place]:
        raise ValueError(f"the data set has no image {printable(missing[0])}: give the store's own")
    cells = max(1, maps.shape[-1] // 8)
    told = counted(progress, "moved images", len(ids), "image")
    moved: dict[str, list[Tensor]] = {"mirrored": [], "shifted": []}
    for start in range(0, len(ids), BATCH):
        names = ids[start : start + BATCH]
        pixels = torch.stack([backbone.transform(dataset.read(place[name])) for name in names])
        shift = round(cells * pixels.shape[-1] / maps.shape[-1])
        for name, image in (("mirrored", flipped(pixels)), ("shifted", pixels.roll(shift, -1))):
            with torch.no_grad():
                grids = grids_as_stored(backbone, backbone.encode(image), names, about)
            moved[name].append(encode_grid(model, grids, about, latents).maps(latents).cpu())
        told(len(names))
    mirrored, shifted = (torch.cat(parts) for parts in moved.values())
    kept, again = overlap(maps, shifted, cells)
    return {
        "mirrored": agreement(maps, flipped(mirrored), seed=config.seed),
        "shifted": agreement(kept, again, seed=config.seed) | {"cells": cells},
    }


def read_masks(
    folder: Path, ids: Sequence[str], grid: tuple[int, int], crop: Crop | None = None
) -> Int64[Tensor, "images h w"]:
    """The class of each cell: of the pixel at its middle, once masks are cut as the model cuts pictures.

    Args:
        folder: holds a picture for each image, named by its id with the suffix `.png`.
        ids: of the images.
        grid: height and width of the grids.
        crop: the model's; None: not known, the middle square.

    Raises:
        ImageError: a mask is missing or no picture of one channel; it is named.
    """
    found = []
    for name in ids:
        path = path_in(folder, str(Path(name).with_suffix(".png")), what="a mask")
        with decoded(path, str(path)) as picture:
            if picture.mode not in ("L", "P", "1"):
                raise ValueError(f"it has the mode {picture.mode}: give one channel of classes")
            side = min(picture.size)
            seen = crop or Crop(side, side, offset="down")
            small = seen.view(picture, (grid[1], grid[0]), "nearest")
            found.append(torch.from_numpy(np.array(small).astype(np.int64)))
    return torch.stack(found)
