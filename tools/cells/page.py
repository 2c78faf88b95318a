"""docs/cells.md, docs/cells.json, and sheets of heat maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from revelio.activations.store import ActivationStore
from revelio.analysis.cells import encode_grid
from revelio.analysis.config import TopImagesConfig
from revelio.analysis.top_images import TopImages, top_images
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.data.transforms import center_square
from revelio.pipelines.inputs import open_sae
from revelio.run_dir import write_json, write_whole
from revelio.sae.model import KSparseAutoencoder
from tools.cells.setting import ARMS, SETTINGS, Setting, Work

SIDE, SHOWN, ROWS, GAP, TOP = 72, 5, 10, 12, 20
# A latent that fires on more images than this is of nothing in particular.
COMMON = 0.25
HEAT = np.array([255, 96, 0])


def write_page(work: Work, found: Mapping[str, Any], docs: Path) -> None:
    """Write the page, the figures behind it, and a sheet of heat maps a setting."""
    write_json(docs / "cells.json", found)
    for setting in SETTINGS:
        sheet(work, setting).save(docs / f"cells_{setting.name}.png", optimize=True)
    write_whole(docs / "cells.md", "\n".join(text(found)) + "\n")


def sheet(work: Work, setting: Setting) -> Image.Image:
    """A row a latent: its top held-out images with where it fires; cells on the left, pooled on the right."""
    width = 2 * SHOWN * SIDE + GAP
    picture = Image.new("RGB", (width, TOP + ROWS * SIDE), "white")
    pen = ImageDraw.Draw(picture)
    store = ActivationStore.open(setting.store(work.folder, "test", setting.main, setting.t))
    pictures = open_dataset(work.data(setting, "test"))
    for number, arm in enumerate(reversed(ARMS)):
        left = number * (SHOWN * SIDE + GAP)
        pen.text((left + 2, 4), f"k-SAE of {'cells' if arm == 'cells' else 'pooled rows'}", fill=0)
        path = next(work.ksaes(setting, arm, setting.main, setting.t))
        model = open_sae(str(path), "cpu")
        top = top_images(model, store, TopImagesConfig(m=SHOWN))
        for row, latent in enumerate(_spread(top)):
            strip = _strip(model, store, pictures, top, latent)
            picture.paste(strip, (left, TOP + row * SIDE))
    return picture


def _spread(top: TopImages) -> list[int]:
    """Latents spread over the 100 strongest that are neither rare nor common: none is picked by eye."""
    strong = [
        one for one in top.ranking().tolist() if top.strength[one] > 0 and top.density[one] < COMMON
    ][:100]
    return strong[:: max(1, len(strong) // ROWS)][:ROWS]


def _strip(
    model: KSparseAutoencoder,
    store: ActivationStore,
    pictures: ImageDataset,
    top: TopImages,
    latent: int,
) -> Image.Image:
    """The top images of a latent side by side; the brighter a cell, the stronger it fires there."""
    strip = Image.new("RGB", (SHOWN * SIDE, SIDE), "white")
    place = {name: index for index, name in enumerate(pictures.ids)}
    rows = [row for row in top.indices[latent].tolist() if row >= 0]
    grids = np.stack([store.rows(row, row + 1)[0].float().numpy() for row in rows])
    import torch

    codes = encode_grid(model, torch.from_numpy(grids), store.manifest)
    maps = codes.maps(torch.tensor([latent]))[:, 0].numpy()
    for number, (row, one) in enumerate(zip(rows, maps / max(maps.max(), 1e-9), strict=True)):
        seen = pictures.read(place[store.ids[row]]).convert("RGB")
        square = np.asarray(center_square(seen, SIDE, "bicubic")).astype(float)
        heat = Image.fromarray((255 * one).astype(np.uint8)).resize((SIDE, SIDE), 0)
        alpha = 0.75 * np.asarray(heat)[:, :, None] / 255
        grey = 0.6 * square.mean(2, keepdims=True) + 0.4 * square
        mixed = (1 - alpha) * grey + alpha * HEAT
        strip.paste(Image.fromarray(mixed.astype(np.uint8)), (number * SIDE, 0))
    return strip
