"""A page a picture: the answer, and for each k-SAE the latents that carried it, with where they did.

    explanation.json   the numbers: effects by latent and token, and the check by ablation
    index.html         the same to look at; pictures/0.jpg, ...; gallery.css

An effect is gradient x activation (:mod:`llava_ext.latents`), shown summed over a latent's tokens; its heat
map is what it comes to at each cell. Beside it stands what the answer's log-probability really loses without
the strongest pairs of latent and token, and without random ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_ext.config import IMAGE_INDEX, IMAGE_TOKEN, ExplainConfig
from llava_ext.conversation import Turn
from llava_ext.generate import Assistant
from llava_ext.images import open_picture
from llava_ext.latents import (
    Effects,
    attribute,
    log_probabilities,
    raster,
    read_ksaes,
    top_and_random,
    without,
)
from llava_ext.model import LlavaModel
from llava_ext.templates import encode
from revelio.analysis.gallery.heat_maps import LEVELS, levels
from revelio.data.transforms import center_square
from revelio.outputs import replace_files
from revelio.pages import render_page
from revelio.run_dir import write_json
from revelio.sae.model import KSparseAutoencoder

MAKER = "explain"
SIDE = 320  # of a picture on the page, in pixels


def explain(config: ExplainConfig) -> dict[str, Any]:
    """Answer, attribute, check and write the page.

    Returns:
        What ``explanation.json`` holds.

    Raises:
        KeyError: an unknown layer or backbone.
        ValueError: a picture, model or k-SAE can't be read, or they don't fit together.
    """
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
    found = {"question": config.question, "model": Path(config.model).name, "pictures": parts}
    replace_files(config.out, MAKER, lambda folder: _write(folder, found, pictures))
    return found


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
    height, width = raster(model, layer)
    latents = [
        {"latent": latent, "effect": effect, "map": _map(model, asked, layer, found, latent)}
        for latent, effect in found.by_latent(config.latents)
    ]
    return {
        "layer": layer,
        "log_probability": whole,
        "pairs": len(top),
        "lost_without_top": lost["top"],
        "lost_without_random": lost["random"],
        "predicted": float(top.effects.sum()),
        "rows": height,
        "columns": width,
        "latents": latents,
    }


def cells_of(model: LlavaModel, ids: Sequence[int], layer: str, tokens: Tensor) -> Tensor:
    """The cell that each token stands for; -1 for text. In the language model, of whichever tower."""
    if not layer.startswith("block"):
        return tokens
    place = tokens - list(ids).index(IMAGE_INDEX)
    inside = (place >= 0) & (place < model.image_tokens)
    height, width = raster(model, layer)
    interleaved = model.settings.fusion == "interleave"
    cells = place // len(model.settings.towers) if interleaved else place % (height * width)
    return torch.where(inside, cells, -1)


def _map(
    model: LlavaModel, asked: Asked, layer: str, found: Effects, latent: int
) -> list[list[float]]:
    """Effects of a latent as (cell, effect, level) of 255, cells ascending; text has no cell."""
    some = found.chosen(found.latents == latent)
    cells = cells_of(model, asked.batch["input_ids"][0].tolist(), layer, some.tokens)
    height, width = raster(model, layer)
    total = torch.zeros(height * width).index_add_(0, cells[cells >= 0], some.effects[cells >= 0])
    at = (total > 0).nonzero().flatten()
    flat = levels({0: (at, total[at])})[0] if len(at) else []
    return [
        [cell, float(total[cell]), level / LEVELS]
        for cell, level in zip(flat[::2], flat[1::2], strict=True)
    ]


def _write(folder: Path, found: dict[str, Any], pictures: Sequence[Image.Image]) -> None:
    """The page, its pictures and the numbers."""
    write_json(folder / "explanation.json", found)
    (folder / "pictures").mkdir()
    for number, picture in enumerate(pictures):
        square = center_square(picture.convert("RGB"), min(SIDE, *picture.size), "bicubic")
        square.save(folder / "pictures" / f"{number}.jpg", quality=85)
    style = files("revelio.analysis.gallery") / "static" / "gallery.css"
    (folder / "gallery.css").write_bytes(style.read_bytes())
    page = render_page("llava_ext", "explain.html.j2", found, folder="pages", strict=True)
    (folder / "index.html").write_text(page, encoding="utf-8")
