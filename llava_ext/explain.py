"""A page a picture: the answer, and for each k-SAE the latents that carried it, with where they did.

    explanation.json   the numbers: effects by latent and token, and the check by ablation
    index.html         the same to look at; gallery.css
    pictures/          0.jpg, ...: the pictures; 0-tower1.jpg, ...: what of them a tower sees

An effect is gradient x activation (:mod:`llava_ext.latents`), shown summed over a latent's tokens; its heat
map is what it comes to at each cell. In the language model, paired towers share a map; towers that stand one
behind the other (``fusion: sequence``) have one each; a resampler's tokens stand for no cells, and have none.
Beside it stands what the answer's log-probability
really loses without the strongest pairs of latent and token, and without random ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from llava_ext.called import called
from llava_ext.config import IMAGE_INDEX, IMAGE_TOKEN, ExplainConfig
from llava_ext.conversation import Turn
from llava_ext.generate import Assistant
from llava_ext.images import open_picture
from llava_ext.latents import (
    Effects,
    attribute,
    has_cells,
    log_probabilities,
    read_ksaes,
    top_and_random,
    tower_of,
    tower_raster,
    without,
)
from llava_ext.model import LlavaModel
from llava_ext.templates import encode
from llava_ext.towers import seen_square
from revelio.analysis.gallery.heat_maps import LEVELS, levels
from revelio.config import to_plain
from revelio.data.picture import as_rgb
from revelio.outputs import check_same_settings, claimed, read_record, replace_files
from revelio.pages import render_page
from revelio.run_dir import write_json
from revelio.sae.model import KSparseAutoencoder
from revelio.trust import printable

MAKER = "explain"
RESULT = "explanation.json"
SIDE = 320  # of a picture on the page, in pixels


def explain(config: ExplainConfig) -> dict[str, Any]:
    """Answer, attribute, check and write the page.

    Returns:
        What ``explanation.json`` holds.

    Raises:
        KeyError: an unknown layer or backbone.
        ValueError: a picture, model or k-SAE can't be read, they don't fit together, or the page's folder
            holds pictures of the user's, or a page of other settings.
    """
    _check_place(config)
    with claimed(config.out):
        check_same_settings(config.out / RESULT, config)
        return _explain(config)


def _explain(config: ExplainConfig) -> dict[str, Any]:
    pictures = [open_picture(path) for path in config.image]
    ksaes = read_ksaes(config.ksae)
    assistant = Assistant.load(
        config.model, device=config.device, dtype=config.dtype, allow=config.allow
    )
    parts = []
    for path, picture in zip(config.image, pictures, strict=True):
        asked = ask(assistant, picture, config.question, config.answer, **config.decoding())
        layers = [
            _layer(assistant.model, asked, layer, ksae, config) for layer, ksae in ksaes.items()
        ]
        parts.append({"picture": path.name, "answer": asked.answer, "layers": layers})
    found = {"question": config.question, "model": called(config.model), "pictures": parts}
    found["config"] = to_plain(config)
    replace_files(config.out, MAKER, lambda folder: _write(folder, found, pictures, assistant))
    return found


def _check_place(config: ExplainConfig) -> None:
    """Refuse a folder of pictures that no earlier page brought: one looks for results elsewhere.

    Raises:
        ValueError: it is one.
    """
    out = config.out
    ours = {name for names in read_record(out).values() for name in names}
    here = (path.name for path in out.iterdir()) if out.is_dir() else ()
    inside = (path.resolve() for path in config.image)
    own = [str(path.relative_to(out.resolve())) for path in inside if out.resolve() in path.parents]
    for name in sorted({*here, *own} - ours):
        if Path(name).suffix.lower() in Image.registered_extensions():
            raise ValueError(
                f"{out} is a folder of pictures ({printable(name)}): choose another for the page"
            )


@dataclass(frozen=True)
class Asked:
    """A question about one picture with its answer, as the model takes it."""

    answer: str
    batch: Mapping[str, Any]


def ask(
    assistant: Assistant,
    picture: Image.Image,
    question: str,
    answer: str | None = None,
    **decoding: Any,
) -> Asked:
    """A question with the model's own answer, or with a given one.

    Raises:
        ValueError: the model answers nothing.
    """
    settings = assistant.model.settings
    user = Turn("user", f"{IMAGE_TOKEN}\n{question.strip()}")
    grids = assistant.see([picture], [question.strip()])
    answer = answer or assistant.reply([[user]], grids, **decoding)[0]
    if not answer:
        raise ValueError("the model answers nothing: give an answer to explain")
    turns = [user, Turn("assistant", answer)]
    encoded = encode(assistant.tokenizer, settings.template, turns, settings.system)
    rows = {"input_ids": encoded.input_ids, "labels": encoded.labels}
    tensors = {
        name: torch.tensor([row], device=assistant.model.device) for name, row in rows.items()
    }
    mask = torch.ones_like(tensors["input_ids"])
    return Asked(answer, tensors | {"attention_mask": mask, "grids": grids})


def _layer(
    model: LlavaModel, asked: Asked, layer: str, ksae: KSparseAutoencoder, config: ExplainConfig
) -> dict[str, Any]:
    """One layer's latents, and what the answer loses without them."""
    (found,) = attribute(model, asked.batch, layer, ksae)
    top, random = top_and_random(found, config.pairs, config.seed)
    with torch.no_grad():
        whole = float(log_probabilities(model, asked.batch))
    lost = {
        name: whole - float(without(model, asked.batch, layer, ksae, [removed]))
        for name, removed in (("top", top), ("random", random))
    }
    views = _views(model, layer)
    rasters = zip(views, (tower_raster(model, each) for each in views), strict=True)
    latents = [
        {"latent": latent, "effect": effect, "maps": _maps(model, asked, layer, found, latent)}
        for latent, effect in found.by_latent(config.latents)
    ]
    return {
        "layer": layer,
        "log_probability": whole,
        "pairs": len(top),
        "lost_without_top": lost["top"],
        "lost_without_random": lost["random"],
        "predicted": float(top.effects.sum()),
        "views": [{"tower": each, "rows": h, "columns": w} for each, (h, w) in rasters],
        "without_cells": [each for each in _towers(model, layer) if each not in views],
        "latents": latents,
    }


def _towers(model: LlavaModel, layer: str) -> list[int]:
    """The towers whose tokens a layer holds one behind the other; of paired ones the first that has cells."""
    one = tower_of(layer)
    if one is not None:
        return [one]
    every = list(range(len(model.settings.towers)))
    if model.settings.fusion == "sequence":
        return every
    return [next((each for each in every if has_cells(model, each)), 0)]


def _views(model: LlavaModel, layer: str) -> list[int]:
    """The towers on whose rasters a layer is drawn."""
    return [each for each in _towers(model, layer) if has_cells(model, each)]


def cells_of(
    model: LlavaModel, ids: Sequence[int], layer: str, tokens: Int64[Tensor, " e"]
) -> tuple[Int64[Tensor, " e"], Int64[Tensor, " e"]]:
    """What each token stands for: which of :func:`_views`, by its place there, and the cell of its raster.

    Both are -1 for text, and for tokens that stand for no cell. Paired towers stand for the same cells.
    """
    if tower_of(layer) is not None:
        view, cell = torch.zeros_like(tokens), tokens
        outside = torch.zeros_like(tokens, dtype=torch.bool)
    else:
        place = tokens - list(ids).index(IMAGE_INDEX)
        outside = (place < 0) | (place >= model.image_tokens)
        if model.settings.fusion == "interleave":
            view, cell = torch.zeros_like(place), place // len(model.settings.towers)
        else:
            lengths = [prod(tower_raster(model, each)) for each in _towers(model, layer)]
            ends = torch.tensor(lengths).cumsum(0)
            view = torch.bucketize(place, ends[:-1], right=True)
            cell = place - (ends - torch.tensor(lengths))[view]
    views = _views(model, layer)
    drawn = [views.index(each) if each in views else -1 for each in _towers(model, layer)]
    view = torch.tensor(drawn)[view]
    outside = outside | (view < 0)
    return view.masked_fill(outside, -1), cell.masked_fill(outside, -1)


def _maps(
    model: LlavaModel, asked: Asked, layer: str, found: Effects, latent: int
) -> list[list[list[float]]]:
    """Effects of a latent by view as (cell, effect, level) of 255, cells ascending; text has no cell.

    Levels are of the strongest cell of all views.
    """
    some = found.chosen(found.latents == latent)
    views, cells = cells_of(model, asked.batch["input_ids"][0].tolist(), layer, some.tokens)
    sizes = [prod(tower_raster(model, each)) for each in _views(model, layer)]
    starts = list(accumulate(sizes, initial=0))
    inside = cells >= 0
    flat = torch.tensor(starts)[views[inside]] + cells[inside]
    total = torch.zeros(starts[-1]).index_add_(0, flat, some.effects[inside])
    at = (total > 0).nonzero().flatten()
    shown = levels({0: (at, total[at])})[0] if len(at) else []
    pairs = list(zip(shown[::2], shown[1::2], strict=True))
    return [
        [
            [cell - low, float(total[cell]), level / LEVELS]
            for cell, level in pairs
            if low <= cell < high
        ]
        for low, high in pairwise(starts)
    ]


def _write(
    folder: Path, found: dict[str, Any], pictures: Sequence[Image.Image], assistant: Assistant
) -> None:
    """The page, its pictures and the numbers."""
    write_json(folder / RESULT, found)
    (folder / "pictures").mkdir()
    aspect = assistant.model.settings.aspect
    for number, (picture, part) in enumerate(zip(pictures, found["pictures"], strict=True)):
        shown = {f"{number}": as_rgb(picture).copy()}
        shown[f"{number}"].thumbnail((SIDE, SIDE))
        for tower in {view["tower"] for layer in part["layers"] for view in layer["views"]}:
            square = seen_square(assistant.towers[tower], picture, aspect, SIDE)
            shown[f"{number}-tower{tower}"] = square
        for name, image in shown.items():
            image.save(folder / "pictures" / f"{name}.jpg", quality=85)
    style = files("revelio.analysis.gallery") / "static" / "gallery.css"
    (folder / "gallery.css").write_bytes(style.read_bytes())
    page = render_page("llava_ext", "explain.html.j2", found, folder="pages", strict=True)
    (folder / "index.html").write_text(page, encoding="utf-8")
