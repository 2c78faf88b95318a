"""docs/cells.md, docs/cells.json, and sheets of heat maps."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from revelio.activations.store import ActivationStore
from revelio.analysis.cells import encode_grid
from revelio.analysis.config import TopImagesConfig
from revelio.analysis.gallery.told import locality_measures
from revelio.analysis.paired import BEATS
from revelio.analysis.top_images import TopImages, top_images
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.data.transforms import Crop
from revelio.evaluation.measures import MEASURES
from revelio.pipelines.inputs import open_sae
from revelio.run_dir import write_json, write_whole
from revelio.sae.model import KSparseAutoencoder
from revelio.text_tables import markdown_table
from tools.cells.setting import ARMS, SETTINGS, Setting, Work

SIDE, SHOWN, ROWS, GAP, TOP = 72, 5, 10, 12, 20
# A latent that fires on more images than this is of nothing in particular.
COMMON = 0.25
HEAT = np.array([255, 96, 0])


def write_page(work: Work, found: Mapping[str, Any], docs: Path) -> None:
    """Write the page, the figures behind it, and a sheet of heat maps a setting."""
    write_json(docs / "cells.json", found)
    for setting in [one for one in SETTINGS if one.name in found["settings"]]:
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
    codes = encode_grid(model, torch.from_numpy(grids), store.manifest)
    maps = codes.maps(torch.tensor([latent]))[:, 0].numpy()
    crop = Crop.of(store.manifest) or Crop(SIDE, SIDE)
    for number, (row, one) in enumerate(zip(rows, maps / max(maps.max(), 1e-9), strict=True)):
        seen = pictures.read(place[store.ids[row]]).convert("RGB")
        square = np.asarray(crop.view(seen, (SIDE, SIDE), "bicubic")).astype(float)
        heat = Image.fromarray((255 * one).astype(np.uint8)).resize((SIDE, SIDE), 0)
        alpha = 0.75 * np.asarray(heat)[:, :, None] / 255
        grey = 0.6 * square.mean(2, keepdims=True) + 0.4 * square
        mixed = (1 - alpha) * grey + alpha * HEAT
        strip.paste(Image.fromarray(mixed.astype(np.uint8)), (number * SIDE, 0))
    return strip


INTRO = """\
# k-SAEs of cells against k-SAEs of pooled activations

Rendered by `python -m tools.cells_proof` from `cells.json`. Both k-SAEs of a pair see as many rows ({rows:,},
of pooled activations or of single cells), have as many latents (expansion {expansion}, k = {k}) and the same
budget; {seeds} trainings each. An image's code is that of its pooled activation, or the maximum over its
cells' codes. Everything is measured on held-out images. Intervals over trainings are Student's, 95 %; of
locality, 95 % bootstraps over latents of the first training. The sizes are small: pooled rows are read many
times over, cells about once, and what is not settled here may be settled by more."""

READING = """\
## How to read the tables

*pooled* and *cells* are the two k-SAEs, each a mean over trainings. *its best control* is the best of six
control dictionaries, at most as many directions that no training of an autoencoder found: random
directions, data rows, channels, principal axes (PCA), k-means centroids, independent axes (ICA).
*difference* is cells minus pooled with its interval. *verdict* compares the k-SAE of cells with its
controls, each by an interval of the difference: it beats all of them; or it is not told apart from those
whose interval holds 0; or it is beaten by those whose interval lies on the other side. *chance* in the
second table is what codes as sparse give at random places (entropy, area), a map of another image
(agreement), or shifted masks (IoU). In the last one, *probability* is the share of resamplings in which the
paper's ordering holds, *by chance* how often it would if the values were dealt to the rows at random.

Better low: fvu (fraction of variance unexplained), sigma_label (standard deviation of the class ids of a
latent's top images, which depends on the classes' order) and entropy of their labels. Better high: cosine
of an activation and its reconstruction; purity, the commonest label's share among a latent's 10 top
images (distinct: near-duplicates counted once); same-class pairs among them; probe 1, 5, 20, the balanced
accuracy of a logistic regression a class on so many latents; coverage 0.5, 0.8, the share of classes with
a latent of F1 above that; significant, the share of latents whose top images hold more of a class than
chance allows."""

ORDER = """\
Verdicts as in `docs/results.md`: *holds* from a probability of 0.95 on, over trainings and images; the
paper's claims are of pooled k-SAEs of SD-1.5 at other sizes."""


def text(found: Mapping[str, Any]) -> list[str]:
    """The page: all verdicts first, then the tables and pictures of each setting."""
    sizes = found["sizes"]
    rows = sizes["steps"] * sizes["batch"]
    seeds = len(sizes["seeds"])
    lines = [INTRO.format(rows=rows, expansion=sizes["expansion"], k=sizes["k"], seeds=seeds), ""]
    lines += [READING, ""]
    lines += ["## Where cells are better, and where not", "", *_compared(found["settings"]), ""]
    for name, one in found["settings"].items():
        lines += [f"## {one['title']}, {one['layer']}{_at(one['timestep'])}", ""]
        lines += [f"{one['images'][0]:,} images to train on, {one['images'][1]:,} held out.", ""]
        lines += [*_measures(one), "", *_locality(one), "", *_orderings(one)]
        lines += [
            f"![heat maps](cells_{name}.png)",
            "",
            f"Each row a latent, spread over the 100 strongest that fire on less than {COMMON:.0%} of the "
            "images, none picked by eye: its top held-out images, colored where it fires.",
            "",
        ]
    return lines


def _at(timestep: int | None) -> str:
    return "" if timestep is None else f", t = {timestep}"


def _compared(settings: Mapping[str, Any]) -> list[str]:
    """The k-SAE of cells against the pooled one and its controls: a line a measure, a column a model."""
    models = list(settings.values())
    names = list(dict.fromkeys(name for one in models for name in one["cells_minus_pooled"]))
    parts = {
        "than the k-SAE of pooled activations": _than_pooled,
        "than control dictionaries": _than_controls,
    }
    lines = []
    for heading, said in parts.items():
        rows = [[f"better {heading}?", *(one["title"] for one in models)]]
        rows += [[name, *(said(one, name) for one in models)] for name in names]
        lines += [markdown_table(rows), ""]
    return [
        *lines,
        "Which controls these are, and all values: in each model's table below. Where some control is "
        "better, those that are not told apart are not counted.",
    ]


def _than_pooled(one: Mapping[str, Any], name: str) -> str:
    """By the interval of the difference."""
    if name not in one["cells_minus_pooled"]:
        return "not measured"
    low, high = sorted(_better(name) * end for end in one["cells_minus_pooled"][name]["interval"])
    return "**worse**" if high < 0 else "better" if low > 0 else "not told apart"


def _than_controls(one: Mapping[str, Any], name: str) -> str:
    """The verdict, with the controls that it names counted."""
    if name not in one["measures"]["cells"]:
        return "not measured"
    verdict, controls = one["measures"]["cells"][name]["verdict"], one["controls"]["cells"][name]
    if verdict == BEATS:
        return "better than all"
    named = sum(control in verdict for control in controls)
    said = "**worse** than" if verdict.startswith("beaten") else "not told apart from"
    return f"{said} {named} of {len(controls)}"


def _better(name: str) -> int:
    return MEASURES[name].better if name in MEASURES else 1


def _measures(one: Mapping[str, Any]) -> list[str]:
    head = ("measure", "pooled", "its best control", "cells", "their best control", "difference")
    rows = [[*head, "verdict"]]
    for name, gap in one["cells_minus_pooled"].items():
        row = [name]
        for arm in ARMS:
            controls = one["controls"][arm][name]
            best = max(controls, key=lambda key: _better(name) * controls[key], default="")
            row.append(f"{one['measures'][arm][name]['value']:.3f}")
            row.append(f"{controls[best]:.3f} ({best})" if best else "")
        low, high = gap["interval"]
        row.append(f"{gap['value']:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append([*row, one["measures"]["cells"][name]["verdict"]])
    lines = [markdown_table(rows, "lrrrrl")]
    shares = {
        arm: {name: entry["0.7"]["value"] for name, entry in one["stability"][arm].items()}
        for arm in ARMS
    }
    for arm, entry in shares.items():
        best = max((name for name in entry if name != "k-SAE"), key=entry.__getitem__)
        lines += [
            "",
            f"Stability over seeds, k-SAE of {arm}: {entry['k-SAE']:.0%} of latents have a partner of cosine "
            f"above 0.7 in another training; {best}, drawn anew: {entry[best]:.0%}.",
        ]
    return lines


def _locality(one: Mapping[str, Any]) -> list[str]:
    """A line a measure: the mean over trainings, the first one's interval, its chance level."""
    rows = [["locality and stability of maps", "pooled", "chance", "cells", "chance"]]
    found = {arm: [told_measures(part) for part in one["locality"][arm]] for arm in ARMS}
    for name in found["cells"][0]:
        cells = []
        for arm in ARMS:
            parts = [part[name] for part in found[arm] if name in part]
            value, low, high = parts[0]["of"]
            middle = mean(part["of"][0] or 0.0 for part in parts)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})" if value is not None else "")
            cells.append(f"{mean(part['chance'][0] or 0.0 for part in parts):.3f}")
        rows.append([name, *cells])
    lines = [markdown_table(rows, "lr")]
    for arm in ARMS:
        parts = [
            part["redundancy"]["distinct"] / part["redundancy"]["latents"]
            for part in one["locality"][arm]
        ]
        lines += ["", f"Distinct latents among the strongest, k-SAE of {arm}: {mean(parts):.0%}."]
        peaks = Counter(
            profile["peak"]["timestep"]
            for part in one["locality"][arm]
            for profile in part.get("timesteps", [])
        )
        if peaks:
            said = ", ".join(
                f"{peaks[t] / sum(peaks.values()):.0%} at t = {t}" for t in sorted(peaks)
            )
            lines[-1] += f" Timesteps at which latents fire most: {said}."
    return lines


def told_measures(part: Mapping[str, Any]) -> dict[str, Any]:
    """The measures of a result of `revelio locality`, as the gallery names them."""
    return {one["name"]: one for one in locality_measures(part)["measures"]}


def _orderings(one: Mapping[str, Any]) -> list[str]:
    claims = one["orderings"]["cells"]["claims"]
    if not claims:
        return []
    rows = [["sigma_label on held-out images", "pooled", "cells"]]
    both = zip(*(one["orderings"][arm]["cases"] for arm in ARMS), strict=True)
    for cases in both:
        shown = [
            f"{case['sigma']['value']:.2f} ({case['sigma']['interval'][0]:.2f} to "
            f"{case['sigma']['interval'][1]:.2f})"
            for case in cases
        ]
        rows.append([f"{cases[0]['layer']}{_at(cases[0]['timestep'])}", *shown])
    judged = [["the paper claims", "pooled", "probability", "cells", "probability", "by chance"]]
    for pooled, cells in zip(one["orderings"]["pooled"]["claims"], claims, strict=True):
        sides = [
            side
            for arm in (pooled, cells)
            for side in (arm["verdict"], f"{arm['probability']:.2f}")
        ]
        judged.append([cells["text"], *sides, f"{cells['by_chance']:.2f}"])
    return [markdown_table(rows, "lr"), "", markdown_table(judged, "llrlr"), "", ORDER, ""]
