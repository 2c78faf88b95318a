"""The paper's figures of pictures, on the shipped models: top images of latents, and PCA maps."""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from revelio.analysis.gallery.write import thumbnail_path

# Of a row: latents below each other, their images beside each other, in pixels.
LATENTS, IMAGES, SIDE, GAP, TITLE = 5, 5, 56, 20, 18


def top_images(result: Mapping[str, Any], root: Path) -> Image.Image:
    """A block of the strongest latents' top images for each row of an item that has a gallery.

    None is picked by eye: they are the gallery's first.

    Args:
        result: what `reproduce` returned of the item.
        root: the folder of its page, which the galleries' paths begin at.
    """
    rows = [row for row in result["rows"] if "gallery" in row]
    block = IMAGES * SIDE
    size = (len(rows) * (block + GAP) - GAP, TITLE + LATENTS * SIDE)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left, folder = number * (block + GAP), (root / row["gallery"]).parent
        pen.text((left + 2, 3), f"{row['our_model']} {'+'.join(row['our_layers'])}", fill=0)
        with (folder / "latents.jsonl").open(encoding="utf-8") as lines:
            strongest = [json.loads(line) for line in islice(lines, LATENTS)]
        for down, latent in enumerate(strongest):
            for right, (image, _) in enumerate(latent["top"][:IMAGES]):
                with Image.open(folder / thumbnail_path(image)) as thumbnail:
                    small = thumbnail.convert("RGB").resize((SIDE, SIDE))
                sheet.paste(small, (left + right * SIDE, TITLE + down * SIDE))
    return sheet


def pictures_of(result: Mapping[str, Any], root: Path) -> Image.Image | None:
    """What an item shows, as one picture; None: numbers alone."""
    if any("gallery" in row for row in result["rows"]):
        return top_images(result, root)
    sheets = [row["sheet"] for row in result["rows"] if "sheet" in row]
    return Image.open(root / sheets[0]).convert("RGB") if sheets else None


def without_paths(result: dict[str, Any]) -> dict[str, Any]:
    """An item whose rows name no gallery and no sheet: they are not where the page is."""
    rows = [
        {name: value for name, value in row.items() if name not in ("gallery", "sheet")}
        for row in result["rows"]
    ]
    return result | {"rows": rows}
