"""List the known models and their layers, or say all about one. Nothing is downloaded for the list.

    revelio backbones
    revelio backbones sd-1.5
    revelio backbones path/to/folder

A layer is written `name channels/stride`: the stride is how many pixels of the image a grid cell spans,
so that a grid's side is the image's divided by it. Any folder or hub id in diffusers layout (Stable
Diffusion 1.x to 3.5, Flux, DeepFloyd-IF, DiT, PixArt, pixel-space DDPMs) or with a CLIP or DINOv2 config is
taken like a known name.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from revelio.following import following
from revelio.text_tables import columns

if TYPE_CHECKING:
    from revelio.backbones.source import Description


@dataclass(frozen=True)
class Config:
    """What to list."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A known name, a folder, or a hub id; none: the list."""

    revision: str | None = None
    """The revision of a hub id."""


def run(config: Config) -> None:
    """Print the table, or one model."""
    from revelio.backbones.registry import describe, describe_one

    if config.name is None:
        rows = [_row(about) for about in describe()]
        print(
            columns([("name", "kind", "px", "layers: channels/stride", "source", "about"), *rows])
        )
        print(
            "\nAny of these, a folder, or a hub id is a --backbone.name. `revelio backbones NAME`: more."
        )
        print(following("backbones", "mini-sd"))
    else:
        about = describe_one(config.name, config.revision)
        print(details(about))
        print(f"\n{_next(config, about)}")


def _next(config: Config, about: "Description") -> str:
    """The extraction of its middle layer."""
    name = ["--backbone.name", config.name]
    name += ["--backbone.revision", config.revision] if config.revision else []
    layers = list(about.layers) or ["LAYER"]
    # A vision transformer sees pictures without noise.
    timesteps = ["--timesteps"] if about.kind == "ViT" else []
    out = Path("runs") / Path(about.name).name
    return following(
        "extract", *name, "--layers", layers[len(layers) // 2], *timesteps, "--out", out
    )


def details(about: "Description") -> str:
    """One model: a line a fact, then a line a layer with its grid at the model's image size."""
    facts = [("name", about.name), ("kind", about.kind), ("source", about.source)]
    if about.summary:
        facts.append(("about", about.summary))
    if about.note:
        facts.append(("note", about.note))
    if about.image_size:
        facts.append(("image size", f"{about.image_size} px"))
    rows: list[tuple[str, ...]] = [("layer", "channels", "stride", "grid (c h w)")]
    for layer, spec in about.layers.items():
        side = about.image_size // spec.stride
        grid = f"{spec.channels}x{side}x{side}"
        rows.append((layer, str(spec.channels), str(spec.stride), grid))
    head = columns([(f"{name}:", value) for name, value in facts])
    return f"{head}\n\n{columns(rows)}" if about.layers else head


def _row(about: "Description") -> tuple[str, ...]:
    size = str(about.image_size) if about.image_size else "-"
    return about.name, about.kind, size, _layers(about), about.source, about.summary


def _layers(about: "Description") -> str:
    """Neighbours of the same kind and shape as one: `block0...block27 1152/16`."""
    parts = []
    for (_, spec), members in groupby(
        about.layers.items(), key=lambda item: (item[0].rstrip("0123456789"), item[1])
    ):
        names = [name for name, _ in members]
        span = names[0] if len(names) == 1 else f"{names[0]}...{names[-1]}"
        parts.append(f"{span} {spec.channels}/{spec.stride}")
    return ", ".join(parts)
