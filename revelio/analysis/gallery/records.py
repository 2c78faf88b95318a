"""What a gallery shows, as plain values: its latents, its images and their active latents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from revelio.analysis.config import GalleryConfig
from revelio.analysis.gallery.firing import Firing, near_misses, together
from revelio.analysis.label_measures import class_counts
from revelio.analysis.latent_map import directions, label_profiles, layout, neighbours
from revelio.analysis.purity import latent_measures
from revelio.analysis.redundancy import SAME_DIRECTION, SAME_IMAGES
from revelio.analysis.top_images import TopImages
from revelio.seeds import key_seed

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore
    from revelio.sae.model import KSparseAutoencoder

JUDGED = 10
"""The number of top images that a latent's purity is read from (Sec. 4.2)."""
BINS = 24
"""Of the histogram of a latent's activations."""
CLASSES = 24
"""The most classes that a latent's firings are counted for, the commonest first."""
# What every latent has on every page; the rest comes in files, loaded when needed.
COLUMNS = ("id", "mean", "count", "at", "class", "majority", "entropy", "pairs", "sigma")


def latent_columns(
    model: "KSparseAutoencoder", top: TopImages, chosen: Int64[Tensor, "l"], config: GalleryConfig
) -> dict[str, list[Any]]:
    """What every page knows of every latent, strongest first: a list a property."""
    vectors = (
        label_profiles(top, chosen) if config.map_by == "labels" else directions(model, chosen)
    )
    places = layout(vectors, method=config.map_method, seed=config.seed)
    columns: dict[str, list[Any]] = {
        "id": chosen.tolist(),
        "mean": [short(value) for value in top.means[chosen].tolist()],
        "count": top.counts[chosen].tolist(),
        "at": [[round(x, 4), round(y, 4)] for x, y in places.tolist()],
    }
    return columns | (_label_columns(top, chosen) if top.labels is not None else {})


def _label_columns(top: TopImages, chosen: Tensor) -> dict[str, list[Any]]:
    judged = min(JUDGED, top.m)
    found = latent_measures(top, chosen, judged)
    assert top.labels is not None
    rows = top.indices[chosen, :judged]
    labels = torch.where(rows >= 0, top.labels[rows.clamp(min=0)], -1)
    counts = class_counts(labels, max(len(top.classes), int(top.labels.max()) + 1))
    # Ties go to the class of the strongest image; images that all differ have no common class.
    first = counts.amax(1, keepdim=True) == counts.gather(1, labels.clamp(min=0))
    common = labels.gather(1, first.int().argmax(1, keepdim=True))[:, 0]
    several = (counts.amax(1) > 1) | ((rows >= 0).sum(1) == 1)
    # One image alone has no pairs and no deviation.
    columns = {
        name: [None if value != value else short(value) for value in found[name].tolist()]
        for name in ("majority", "entropy", "pairs", "sigma")
    }
    pairs = zip(common.tolist(), several.tolist(), strict=True)
    return columns | {"class": [label if known else None for label, known in pairs]}


@dataclass(frozen=True)
class Similar:
    """Which latents of a gallery are alike, by place.

    Attributes:
        near: by direction: [place, cosine of the decoder rows], nearest first.
        alike: by images: [place, cosine of the codes over all images].
        repeats: the strongest latent that each nearly repeats; None: it is the first of its kind.
    """

    near: list[list[list[float]]]
    alike: list[list[list[float]]]
    repeats: list[int | None]


def similar_latents(
    model: "KSparseAutoencoder",
    top: TopImages,
    chosen: Int64[Tensor, "l"],
    fired: Firing,
    config: GalleryConfig,
) -> Similar:
    """Of each latent those most like it, and which stronger one it repeats.

    It repeats one of these whose decoder row has a cosine above 0.9 with its own, or that shares more than
    half of either's top images (of k-SAEs of cells: of the cells at which they fire most in them); and what
    that one repeats.
    """
    found = neighbours(directions(model, chosen), config.neighbours)
    near = [_pairs(*pair) for pair in zip(*(one.tolist() for one in found), strict=True)]
    alike = [
        [[other, short(cosine)] for other, cosine in pairs]
        for pairs in together(fired.codes, config.neighbours)
    ]
    images = _top_places(top, chosen)
    repeats: list[int | None] = []
    for place, ours in enumerate(images):
        same = [int(other) for other, cosine in near[place] if cosine > SAME_DIRECTION]
        for other in {int(other) for other, _ in [*near[place], *alike[place]]}:
            if len(ours & images[other]) > SAME_IMAGES * len(ours | images[other]):
                same.append(other)
        first = min((other for other in same if other < place), default=None)
        # A stronger one is settled already: so is what it repeats.
        repeats.append(first if first is None or repeats[first] is None else repeats[first])
    return Similar(near, alike, repeats)


def _top_places(top: TopImages, chosen: Int64[Tensor, "l"]) -> list[set[tuple[int, ...]]]:
    """Each latent's top images, with the cells where it fires most: parts of a thing share images alone."""
    parts = top.indices[chosen][..., None]
    if top.places is not None:
        parts = torch.cat([parts, top.places[chosen]], dim=-1)
    return [{tuple(part) for part in row if part[0] >= 0} for row in parts.tolist()]


def latent_records(
    model: "KSparseAutoencoder",
    store: "ActivationStore",
    top: TopImages,
    chosen: Int64[Tensor, "l"],
    fired: Firing,
    similar: Similar,
    config: GalleryConfig,
) -> Iterator[dict[str, Any]]:
    """What the page of each latent shows, strongest first; other latents are named by their place.

    Images are rows of the store with their activation: the strongest (`top`), around the median (`middle`),
    drawn from all that it fires on (`random`), and near misses with what they lack (`misses`). `bins`: how
    many images fire it, in equal steps up to the strongest; `classes`: of all these, [class, images] each;
    `near` and `alike`: similar latents by direction and by images.
    """
    # Of codes of cells there are none: every image comes close somewhere.
    counted = 0 if "cells" in top.source else config.range_images
    missed, gaps = near_misses(model, store, chosen, counted)
    columns = fired.codes.tocsc()
    for place, latent in enumerate(chosen.tolist()):
        part = slice(columns.indptr[place], columns.indptr[place + 1])
        rows, codes = columns.indices[part], columns.data[part]
        yield {
            "id": latent,
            "top": _pairs(top.indices[latent].tolist(), top.values[latent].tolist()),
            "near": similar.near[place],
            "alike": similar.alike[place],
            "misses": _pairs(missed[place].tolist(), gaps[place].tolist()),
        } | _range(latent, rows, codes, top, config)


def _range(
    latent: int, rows: np.ndarray, codes: np.ndarray, top: TopImages, config: GalleryConfig
) -> dict[str, Any]:
    """Images along the range of a latent, and how its activations and classes are distributed."""
    if not len(rows):
        return {"middle": [], "random": [], "bins": [0] * BINS, "most": 0.0, "classes": []}
    count, most = min(config.range_images, len(rows)), float(codes.max())
    middle = np.sort(np.argsort(np.abs(codes - np.median(codes)), kind="stable")[:count])
    drawn = np.random.default_rng(key_seed(config.seed, "random firing", latent))
    random = np.sort(drawn.choice(len(rows), count, replace=False))
    shown: dict[str, Any] = {
        "middle": _strongest_first(rows[middle], codes[middle]),
        "random": _strongest_first(rows[random], codes[random]),
        "bins": np.histogram(codes, BINS, (0.0, most))[0].tolist(),
        "most": short(most),
        "classes": [],
    }
    if top.labels is not None:
        counts = np.bincount(top.labels.numpy()[rows])
        order = np.lexsort((np.arange(len(counts)), -counts))[:CLASSES]
        shown["classes"] = [[int(one), int(counts[one])] for one in order if counts[one]]
    return shown


def _strongest_first(rows: np.ndarray, codes: np.ndarray) -> list[list[float]]:
    order = np.argsort(-codes, kind="stable")
    return _pairs(rows[order].tolist(), codes[order].tolist())


def _pairs(rows: list[int], values: list[float]) -> list[list[float]]:
    return [[row, short(value)] for row, value in zip(rows, values, strict=True) if row >= 0]


def image_records(fired: Firing, limit: int) -> Iterator[dict[str, Any]]:
    """For every image: its active latents of the gallery (place, code), and how many more it has."""
    codes = fired.codes
    for row, active in enumerate(fired.active.tolist()):
        part = slice(codes.indptr[row], codes.indptr[row + 1])
        shown = _strongest_first(codes.indices[part], codes.data[part])[:limit]
        yield {"active": shown, "more": active - len(shown)}


def describe(top: TopImages, chosen: Tensor, config: GalleryConfig) -> dict[str, Any]:
    """What the gallery is of: the numbers and names at its head."""
    known = ("model", "dataset", "split", "layer", "timestep", "prompt_policy", "mode", "codes")
    known += ("seed", "draw", "pool", "image_size", "cells")
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


def short(value: float) -> float:
    """Four significant digits: what a page can show, at a third of the bytes."""
    return float(f"{value:.4g}")
