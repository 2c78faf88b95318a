"""A few strong latents of a k-SAE with their images, for the report."""

from typing import Any

import torch

from revelio.analysis.gallery.write import thumbnail_path
from revelio.analysis.purity import eligible, latent_measures
from revelio.analysis.top_images import TopImages


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
        "strongest": round(float(top.values[latent, 0]), 3),
        "note": f"active on {int(top.counts[latent])} images",
        "images": [
            {
                "src": f"gallery/{thumbnail_path(row)}",
                "label": names[int(top.labels[row])] if names and top.labels is not None else "",
            }
            for row in rows
        ],
    }
