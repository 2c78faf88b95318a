"""What a gallery shows, as plain values: its latents, its images and their active latents."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from revelio.analysis.config import GalleryConfig
from revelio.analysis.label_measures import class_counts
from revelio.analysis.latent_map import directions, label_profiles, layout, neighbours
from revelio.analysis.purity import latent_measures
from revelio.analysis.top_images import TopImages, pooled

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

JUDGED = 10
"""The number of top images that a latent's purity is read from (Sec. 4.2)."""


def latent_records(
    model: "KSparseAutoencoder",
    top: TopImages,
    chosen: Int64[Tensor, "l"],
    config: GalleryConfig,
) -> list[dict[str, Any]]:
    """One record a latent, strongest first; other latents are named by their place in this list."""
    units = directions(model, chosen)
    near, cosines = neighbours(units, config.neighbours)
    vectors = label_profiles(top, chosen) if config.map_by == "labels" else units
    places = layout(vectors, method=config.map_method, seed=config.seed).tolist()
    records = []
    for place, latent in enumerate(chosen.tolist()):
        pairs = zip(top.indices[latent].tolist(), top.values[latent].tolist(), strict=True)
        near_pairs = zip(near[place].tolist(), cosines[place].tolist(), strict=True)
        records.append(
            {
                "id": latent,
                "mean": _short(top.means[latent]),
                "count": int(top.counts[latent]),
                "top": [[row, _short(value)] for row, value in pairs if row >= 0],
                "near": [[other, _short(cosine)] for other, cosine in near_pairs],
                "at": [round(value, 4) for value in places[place]],
            }
        )
    if top.labels is not None and len(chosen):
        _add_labels(records, top, chosen)
    return records


def _add_labels(records: list[dict[str, Any]], top: TopImages, chosen: Tensor) -> None:
    judged = min(JUDGED, top.m)
    found = latent_measures(top, chosen, judged)
    assert top.labels is not None
    rows = top.indices[chosen, :judged]
    labels = torch.where(rows >= 0, top.labels[rows.clamp(min=0)], -1)
    counts = class_counts(labels, max(len(top.classes), int(top.labels.max()) + 1))
    # Ties go to the class of the strongest image; images that all differ have no common class.
    first = counts.amax(1, keepdim=True) == counts.gather(1, labels.clamp(min=0))
    common = labels.gather(1, first.int().argmax(1, keepdim=True))[:, 0]
    for place, record in enumerate(records):
        for name in ("majority", "entropy", "pairs", "sigma"):
            value = found[name][place]
            # One image alone has no pairs and no deviation.
            record[name] = None if value.isnan() else _short(value)
        several = int(counts[place].max()) > 1 or len(record["top"]) == 1
        record["class"] = int(common[place]) if several else None


def image_records(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    chosen: Int64[Tensor, "l"],
    limit: int,
    *,
    batch_size: int = 1024,
) -> list[dict[str, Any]]:
    """For every image: its active latents of the gallery (place, code), and how many more it has."""
    place_of = torch.full((model.n,), -1, dtype=torch.int64)
    place_of[chosen] = torch.arange(len(chosen))
    device = next(model.parameters()).device
    records = []
    with torch.inference_mode():
        for _, rows in store.batches(batch_size):
            codes = model.encode(pooled(rows).to(device), store.manifest)
            order = codes.values.float().cpu().sort(dim=1, descending=True, stable=True)
            places = place_of[codes.indices.cpu().gather(1, order.indices)]
            for values, found in zip(order.values.tolist(), places.tolist(), strict=True):
                records.append(_image_record(values, found, limit))
    return records


def _image_record(values: list[float], places: list[int], limit: int) -> dict[str, Any]:
    active = [(p, v) for p, v in zip(places, values, strict=True) if v > 0]
    shown = [[place, _short(value)] for place, value in active if place >= 0]
    return {"active": shown[:limit], "more": len(active) - len(shown[:limit])}


def describe(top: TopImages, chosen: Tensor, config: GalleryConfig) -> dict[str, Any]:
    """What the gallery is of: the numbers and names at its head."""
    known = ("model", "dataset", "split", "layer", "timestep", "prompt_policy", "mode", "codes")
    meta = {key: top.source[key] for key in known if top.source.get(key) is not None}
    ksae = top.source.get("ksae", {})
    return meta | {
        "images": top.images,
        "n": len(top.counts),
        "d": ksae.get("d"),
        "k": ksae.get("k"),
        "alive": int((top.counts > 0).sum()),
        "shown": len(chosen),
        "map_by": config.map_by,
        "map_method": config.map_method,
        "m": top.m,
        "judged": min(JUDGED, top.m),
        "statistics": top.statistics,
    }


def class_sizes(top: TopImages) -> list[int]:
    """How many images each class has."""
    if top.labels is None:
        return []
    return torch.bincount(top.labels, minlength=len(top.classes)).tolist()


def _short(value: Any) -> float:
    """Four significant digits: what a page can show, at a third of the bytes."""
    return float(f"{float(value):.4g}")
