"""PCA maps of a backbone's grids of some images: taken, fitted, drawn and written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from revelio.analysis.config import MakePCAMapsConfig, PCAMapsConfig
from revelio.analysis.pca_maps import PcaMaps, pca_maps, sheet, side_by_side
from revelio.backbones.base import Backbone, schedule_of
from revelio.backbones.registry import describe_one, load_backbone
from revelio.bounds import check_fields
from revelio.data.loading import Batch, batches
from revelio.data.open import open_dataset
from revelio.data.transforms import Crop, crop_of
from revelio.outputs import Older, check_replaceable, claimed, replace_files
from revelio.pipelines import Report, counted, silent
from revelio.pipelines.inputs import check_same_source
from revelio.run_dir import versions, write_json

__all__ = ["MadePCAMaps", "MakePCAMapsConfig", "collect", "make_pca_maps"]

MAKER = "pca-maps"
FILES = ("sheet.png", "maps.safetensors", "maps.json")
_KEYS = {"model", "dataset", "ids", "skipped", "explained", "versions"}
OLDER = Older("maps.json", lambda found: set(found) >= _KEYS, lambda found: FILES)


@dataclass(frozen=True)
class MadePCAMaps:
    """PCA maps, and the folder with their sheet.

    Attributes:
        path: the folder.
        maps: by `layer` or `layer t=25`; of several models with the model's name before it.
        ids: the images on the sheet, from the top.
    """

    path: Path
    maps: dict[str, PcaMaps]
    ids: list[str]


def make_pca_maps(config: MakePCAMapsConfig, progress: Report = silent) -> MadePCAMaps:
    """Take the grids, fit the components, and write the sheet and the tensors.

    Args:
        config: which images through which layers, and where to write.
        progress: told how many images are done.

    Raises:
        KeyError: a layer that no model has.
        ValueError: a setting is outside its bounds, a model has none of the layers, no image could be read,
            or the folder holds something else: also maps of another model or data set, or of other settings.
    """
    check_fields(config)
    # The default place is named after the images; a place that is given is claimed before they are opened.
    names = [config.backbone.name, *config.others]
    out = config.out or _place(names, open_dataset(config.data).name)
    check_replaceable(out, MAKER, FILES, OLDER)
    with claimed(out):
        dataset = open_dataset(config.data)
        told = counted(progress, "grids", len(names) * len(dataset), "image")
        maps: dict[str, PcaMaps] = {}
        # Models that see the same square of an image share the column that shows it.
        seen: dict[tuple[float, bool] | None, tuple[Crop | None, dict[str, PcaMaps]]] = {}
        models, columns, kept, skipped = [], [], [], []
        for name, layers in _layers_of(names, config).items():
            backbone = load_backbone(replace(config.backbone, name=name), layers=layers)
            own = replace(config, layers=layers, timesteps=_timesteps(backbone, config))
            before = f"{Path(backbone.name).name} " if config.others else ""
            models.append(backbone.name)
            columns += [
                before + _column(*pair) for pair in product(layers, own.timesteps or (None,))
            ]
            ours = [
                "+".join(models),
                dataset.name,
                config.seed,
                sorted(columns),
                sorted(dataset.ids),
            ]
            if len(models) == len(names):
                check_same_source(out / "maps.json", _made_as, ours)
            loaded = batches(
                dataset, backbone.transform, config.batch_size, on_error=config.data.on_error
            )
            kept, skipped, grids = collect(own, backbone, loaded, told)
            found = {before + column: pca_maps(grid) for column, grid in grids.items()}
            maps |= found
            crop = crop_of(backbone.transform)
            square = None if crop is None else (crop.resize / crop.size, crop.stretch)
            seen.setdefault(square, (crop, {}))[1].update(found)
        about = {"model": "+".join(models), "dataset": dataset.name, "seed": config.seed}
        made = MadePCAMaps(out, maps, [dataset.ids[index] for index in kept])
        images = [dataset.read(index) for index in kept]
        sheets = [
            sheet(images, [(k, v.rgb) for k, v in part.items()], side=config.side, crop=crop)
            for crop, part in seen.values()
        ]
        _write(made, side_by_side(sheets), about | {"ids": made.ids, "skipped": skipped})
    return made


def _made_as(found: dict[str, Any]) -> Any:
    """What earlier maps were made from, and how, to be compared; None: they do not say."""
    if not {"seed", "ids", "skipped", "explained"} <= set(found):
        return None
    ids = [*found["ids"], *(name for name, _ in found["skipped"])]
    return [
        found["model"],
        found["dataset"],
        found["seed"],
        sorted(found["explained"]),
        sorted(ids),
    ]


def _column(layer: str, timestep: int | None) -> str:
    return layer if timestep is None else f"{layer} t={timestep}"


def _layers_of(names: Sequence[str], config: MakePCAMapsConfig) -> dict[str, tuple[str, ...]]:
    """The layers that each model shows: all that are asked for, of several models those that each has.

    Raises:
        KeyError: a layer that no model has.
        ValueError: a model has none of the layers, or is named twice.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"a model is named twice among {', '.join(names)}")
    if len(names) == 1:
        return {names[0]: config.layers}
    known = {name: describe_one(name, config.backbone.revision).layers for name in names}
    for layer in config.layers:
        if not any(layer in each for each in known.values()):
            raise KeyError(f"unknown layer {layer!r}: none of {', '.join(names)} has it")
    found = {
        name: tuple(layer for layer in config.layers if layer in each)
        for name, each in known.items()
    }
    for name, layers in found.items():
        if not layers:
            has = ", ".join(known[name])
            raise ValueError(f"{name} has none of the layers: name some of {has} too")
    return found


def _timesteps(backbone: Backbone, config: MakePCAMapsConfig) -> tuple[int, ...]:
    alone = not config.others or schedule_of(backbone) is not None
    return config.timesteps if alone else ()


def _place(models: Sequence[str], dataset: str) -> Path:
    """A folder of its own for the models and the data set."""
    name = "-".join(Path(one).name for one in (*models, dataset))
    return Path("runs") / "pca-maps" / name


def _write(made: MadePCAMaps, page: Any, about: dict[str, Any]) -> None:
    tensors = {
        f"{name}/{key}": tensor
        for name, found in made.maps.items()
        for key, tensor in found.tensors().items()
    }
    explained = {name: found.explained.tolist() for name, found in made.maps.items()}

    def fill(folder: Path) -> None:
        page.save(folder / "sheet.png", format="PNG")
        save_file(tensors, folder / "maps.safetensors")
        write_json(folder / "maps.json", about | {"explained": explained, "versions": versions()})

    replace_files(made.path, MAKER, fill, older=OLDER)


def collect(
    config: PCAMapsConfig, backbone: Backbone, loaded: Iterator[Batch], progress: Any
) -> tuple[list[int], list[list[str]], dict[str, Tensor]]:
    """The images' indices, the skipped ones, and all grids by `layer` or `layer t=25`.

    Raises:
        ValueError: no image could be read.
    """
    found: dict[str, list[Tensor]] = {}
    kept: list[int] = []
    skipped: list[list[str]] = []
    for batch in loaded:
        skipped += [list(pair) for pair in batch.skipped]
        progress(len(batch.ids) + len(batch.skipped))
        if not batch.ids:
            continue
        kept += batch.indices
        with torch.no_grad():
            encoded = backbone.encode(batch.pixels)
        for timestep in config.timesteps or (None,):
            with torch.no_grad():
                grids = backbone.activations(
                    encoded, batch.ids, config.layers, timestep=timestep, seed=config.seed
                )
            for layer in config.layers:
                found.setdefault(_column(layer, timestep), []).append(grids[layer].float().cpu())
    if not kept:
        raise ValueError("not one image could be read")
    return kept, skipped, {name: torch.cat(parts) for name, parts in found.items()}
