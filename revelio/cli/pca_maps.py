"""PCA maps: the top three principal components of a layer's grids as red, green and blue (Fig. 10-12).

One PCA for each layer and timestep, over all cells of all the images, so that a colour means the same
throughout a column of the sheet.

    revelio pca-maps --data.source ~/unrel --backbone.name sd-1.5 --layers bottleneck up_ft1
    revelio pca-maps --data.limit 6 --timesteps 25 200 --out runs/pca

Writes sheet.png, maps.safetensors (a set of tensors for each layer and timestep) and maps.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from revelio.backbones.config import BackboneConfig
from revelio.bounds import Count, Index, NotEmpty, OutFolder, Pixels, Seed
from revelio.data.config import DataConfig

if TYPE_CHECKING:
    from torch import Tensor

    from revelio.backbones.base import Backbone
    from revelio.data.loading import Batch
    from revelio.outputs import Older

FILES = ("sheet.png", "maps.safetensors", "maps.json")


@dataclass(frozen=True)
class Config:
    """Which images through which layers."""

    out: OutFolder = Path("runs/pca-maps")
    """The folder to write."""

    data: DataConfig = field(default_factory=lambda: DataConfig(limit=8))
    """The images; all of them are on the sheet."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""

    layers: Annotated[tuple[str, ...], NotEmpty()] = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
    """Layers, a column each (paper: these four of SD-1.5; blocks of DiT)."""

    timesteps: tuple[Index, ...] = (25,)
    """Timesteps; leave empty for a model without noise (ViT)."""

    seed: Seed = 0
    """Seed of the noise."""

    batch_size: Count = 8
    """Images at a time."""

    side: Pixels = 160
    """Side of a picture on the sheet, in pixels."""


def run(config: Config) -> None:
    """Take the grids, fit the components, write the sheet and the tensors."""
    from revelio.outputs import check_replaceable, claimed

    check_replaceable(config.out, "pca-maps", FILES, _older())
    with claimed(config.out):
        _write(config)


def _older() -> "Older":
    from revelio.outputs import Older

    keys = {"model", "dataset", "ids", "skipped", "explained", "versions"}
    return Older("maps.json", lambda found: keys <= set(found), lambda found: FILES)


def _write(config: Config) -> None:
    from safetensors.torch import save_file

    from revelio.analysis.pca_maps import pca_maps, sheet
    from revelio.cli.options import build_backbone, build_dataset
    from revelio.data.loading import batches
    from revelio.following import beside, flags, following
    from revelio.outputs import replace_files
    from revelio.run_dir import versions, write_json

    dataset = build_dataset(config.data)
    backbone = build_backbone(config.backbone, config.layers)
    loaded = batches(dataset, backbone.transform, config.batch_size, on_error=config.data.on_error)
    kept, skipped, grids = collect(config, backbone, loaded)
    maps = {name: pca_maps(grid) for name, grid in grids.items()}
    columns = [(name, found.rgb) for name, found in maps.items()]
    page = sheet([dataset.read(index) for index in kept], columns, side=config.side)
    tensors = {
        f"{name}/{key}": t for name, found in maps.items() for key, t in found.tensors().items()
    }
    description = {
        "model": backbone.name,
        "dataset": dataset.name,
        "seed": config.seed,
        "ids": [dataset.ids[index] for index in kept],
        "skipped": skipped,
        "explained": {name: found.explained.tolist() for name, found in maps.items()},
        "versions": versions(),
    }

    def fill(folder: Path) -> None:
        page.save(folder / "sheet.png", format="PNG")
        save_file(tensors, folder / "maps.safetensors")
        write_json(folder / "maps.json", description)

    replace_files(config.out, "pca-maps", fill, older=_older())
    for name, found in maps.items():
        print(f"{name}: three components hold {float(found.explained.sum()):.1%} of the variance")
    print(f"wrote {config.out}/sheet.png, maps.safetensors, maps.json ({len(kept)} images)")
    # All of the images this time.
    chosen = [
        *flags(config.data, "data", "source", "split", "root"),
        *flags(config.backbone, "backbone"),
    ]
    chosen += ["--layers", *config.layers, "--timesteps", *map(str, config.timesteps)]
    print(following("extract", *chosen, "--out", beside(config.out, "activations")))


def collect(
    config: Config, backbone: "Backbone", loaded: "Iterator[Batch]"
) -> tuple[list[int], list[list[str]], dict[str, "Tensor"]]:
    """The images' indices, the skipped ones, and all grids by `layer` or `layer t=25`.

    Raises:
        ValueError: no image could be read.
    """
    import torch
    from tqdm import tqdm

    found: dict[str, list[Any]] = {}
    kept: list[int] = []
    skipped: list[list[str]] = []
    for batch in tqdm(loaded, unit="batch", desc="grids"):
        skipped += [list(pair) for pair in batch.skipped]
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
                name = layer if timestep is None else f"{layer} t={timestep}"
                found.setdefault(name, []).append(grids[layer].float().cpu())
    if not kept:
        raise ValueError("not one image could be read: see --data.on-error")
    return kept, skipped, {name: torch.cat(parts) for name, parts in found.items()}
