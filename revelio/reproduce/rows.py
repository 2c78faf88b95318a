"""A row as this run has it: our model, layer, pictures and sizes for the paper's, or what is missing."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

from revelio.analysis.config import PurityConfig
from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import describe
from revelio.data.config import DataConfig
from revelio.data.registry import is_registered
from revelio.diffc.config import FitConfig
from revelio.probes.config import DiffusionClassifierConfig, ProbeName
from revelio.reproduce.config import FROM_PAPER, ReproduceConfig
from revelio.reproduce.items import items
from revelio.reproduce.row import CALTECH, FGVC, PETS, Row
from revelio.sae.config import RunConfig
from revelio.wording import did_you_mean

MAIN = "sd-1.5"
# What a row of a kind stores of a layer: pooled activations or grids.
STORED = {"ksae": "mean", "gallery": "mean"} | dict.fromkeys(
    ("diffc", *get_args(ProbeName)), "none"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is in a scale.

    Attributes:
        sae: the k-SAEs.
        diffc: Diff-C.
        purity: how latents are judged.
        classifier: the Diffusion Classifier.
        train_images: at most so many; None: all.
        test_images: the same, held out.
        zero_shot_images: of those, for the Diffusion Classifier.
        probe_epochs: of the attention and ResNet probes.
        teraflops: what the device sustains where nothing is said.
    """

    sae: RunConfig
    diffc: FitConfig
    purity: PurityConfig
    classifier: DiffusionClassifierConfig
    train_images: int | None = None
    test_images: int | None = None
    zero_shot_images: int | None = None
    probe_epochs: int = 30
    teraflops: float = 20.0


SIZES: Mapping[str, Sizes] = {
    # The paper's; the Diffusion Classifier's plan is its authors' for Pets (SPEC section 8).
    "full": Sizes(
        sae=RunConfig(),
        diffc=FitConfig(),
        purity=PurityConfig(),
        classifier=DiffusionClassifierConfig(samples=(25, 250), keep=(5,), loss="l1"),
    ),
    # The demo's, so that a table takes minutes on a CPU.
    "mini": Sizes(
        sae=RunConfig(
            k=16,
            expansion=16,
            steps=300,
            batch_size=512,
            learning_rate=2e-3,
            warmup_steps=30,
            checkpoint_every=0,
            held_out=0.0,
        ),
        diffc=FitConfig(width=64, epochs=8, batch_size=32, learning_rate=1e-3, validation=0.0),
        purity=PurityConfig(),
        classifier=DiffusionClassifierConfig(samples=(8, 32), keep=(3,)),
        train_images=2000,
        test_images=500,
        zero_shot_images=50,
        probe_epochs=8,
        teraflops=0.03,
    ),
}

# The paper's name -> a backbone. Which SD-2.1 the paper took it does not say; -base is the one at 512 px.
_MODELS = {
    MAIN: "sd-1.5",
    "sd-2.1": "sd-2.1-base",
    "dit-xl-2-512": "dit-xl-2-512",
    "if-i-l": "DeepFloyd/IF-I-L-v1.0",
    "sd-2.0": "sd-2.0-base",
    "diffusion-classifier sd-2.0": "sd-2.0-base",
    "openclip vit-h/14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
_IMAGE_SIZE = {MAIN: 512, "sd-2.0": 512, "sd-2.1": 512}
_MINI_MODELS = {
    (MAIN, PETS): "mini-sd",
    ("dit-xl-2-512", PETS): "mini-dit",
    (MAIN, CALTECH): "mini-sd-photo",
    ("sd-2.0", PETS): "mini-sd",
    ("diffusion-classifier sd-2.0", PETS): "mini-sd",
    ("openclip vit-h/14", PETS): "mini-clip",
    (MAIN, "unrel"): "mini-sd-photo",
}
_MINI_DATA = {PETS: "samples", CALTECH: CALTECH}
# mini-sd-photo was trained on the other split.
_MINI_SPLITS = {CALTECH: "test"}
# Blocks of DiT's 28 at the same depth of mini-dit's 8.
_MINI_BLOCKS = {f"block{n}": f"block{round(n * 8 / 28)}" for n in range(28)}

_NO_COUNTERPART = "quoted from other work: its model has no counterpart here"


@dataclass(frozen=True)
class OurRow:
    """A row of the paper as it is run here.

    Attributes:
        row: the paper's.
        backbone: our model.
        layers: its layers.
        data: the pictures; their split is the pipeline's choice.
        missing: why it can't run; "" where nothing is known to be missing.
    """

    row: Row
    backbone: BackboneConfig
    layers: tuple[str, ...]
    data: DataConfig
    missing: str = ""

    @cached_property
    def set_name(self) -> str:
        """A folder for what rows of the same model and pictures share."""
        model, source = self.backbone.name, self.data.source
        known = any(model == about.name for about in describe())
        return slug(named_apart(model, known), named_apart(source, is_registered(source)))

    @property
    def name(self) -> str:
        """A folder for the row's own results."""
        row = self.row
        kind = "ksae" if row.kind == "gallery" else row.kind
        t = "" if row.timestep is None else f"t{row.timestep}"
        return slug(kind, self.set_name, "-".join(self.layers), t, row.prompt)


def named_apart(given: str, known: bool) -> str:
    """A model's or data set's name in names of folders.

    Args:
        given: a known name, a path or a hub id.
        known: whether it is a known name. Of anything else the last part gets a hash of the whole: folders of
            different places may be called alike.
    """
    if known:
        return given
    path = Path(given)
    whole = path.resolve() if path.exists() else path
    return f"{whole.name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}"


def slug(*parts: str) -> str:
    """Parts as one name of a folder."""
    kept = "-".join(part for part in parts if part)
    return "".join(one if one.isalnum() or one in "-_." else "_" for one in kept)


def our_rows(rows: Iterable[Row], config: ReproduceConfig) -> list[OurRow]:
    """Every row with its model and pictures, or what is missing of it.

    Raises:
        ValueError: a setting names no ``PAPER=OURS``, or a model or data set that no row of any item has.
    """
    rows = list(rows)
    models, roots = pairs(config.backbones, MAIN), pairs(config.roots, "")
    every = [row for one in items().values() if not one.commands for row in one.rows]
    _check_known("backbones", "model", models, (row.model for row in every if row.kind != "quoted"))
    _check_known(
        "roots", "data set", roots, [*(row.dataset for row in every), *_MINI_DATA.values()]
    )
    first = rows[0].dataset if rows else ""
    return [_ours(row, config, models, roots, first) for row in rows]


def _ours(
    row: Row, config: ReproduceConfig, models: dict[str, str], roots: dict[str, str], first: str
) -> OurRow:
    mini, missing = config.scale == "mini", ""
    known = _MINI_MODELS.get((row.model, row.dataset)) if mini else _MODELS.get(row.model)
    model = models.get(row.model, known)
    if row.kind == "quoted" or row.model not in (*_MODELS, *models):
        missing = _NO_COUNTERPART
    elif model is None:
        at = f" for {row.dataset}" if mini else ""
        missing = (
            f"no model stands in for {row.model}{at} in {config.scale} scale: give one as model"
        )
    data, reason = _pictures(row, config, roots, first)
    layers = tuple(row.layer.split("+")) if row.layer else ()
    if mini and model == "mini-dit":
        layers = tuple(_MINI_BLOCKS.get(layer, layer) for layer in layers)
    size = None if mini or row.model in models else _IMAGE_SIZE.get(row.model)
    backbone = BackboneConfig(name=model or row.model, image_size=size, device=config.device)
    return OurRow(row, backbone, layers, data, missing or reason)


def _pictures(
    row: Row, config: ReproduceConfig, roots: Mapping[str, str], first: str
) -> tuple[DataConfig, str]:
    """The pictures of a row, and why there are none."""
    data, mini = config.data, config.scale == "mini"
    source = _MINI_DATA.get(row.dataset) if mini else row.dataset
    root = roots.get(source or row.dataset)
    if data.source != FROM_PAPER:
        if row.dataset == first:
            return data, ""
        if root is None:
            only = f"{data.source} stands in for {first} only"
            return data, f"{only}: give a copy of {source or row.dataset} in roots"
        data = replace(data, split=None, root=None)
    split = data.split or (_MINI_SPLITS.get(row.dataset) if mini else None)
    found = replace(
        data, source=source or row.dataset, root=Path(root) if root else data.root, split=split
    )
    if source is None or row.dataset == "unrel":
        where = f"in {config.scale} scale" if row.dataset == FGVC else "by name"
        return found, f"no pictures are known for {row.dataset} {where}: give them as data.source"
    if mini and source == CALTECH and root is None:
        return found, f"the pictures of {CALTECH} are not shipped: give their folder in roots"
    return found, ""


def _check_known(setting: str, what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a mistyped name: the rows that it is meant for would run without it, or not at all."""
    names = list(dict.fromkeys(known))
    for one in given:
        if one not in names:
            hint = did_you_mean(one, names)
            raise ValueError(
                f"{setting} names {one!r}, and no row has this {what}: {hint}choose from {', '.join(names)}"
            )


def pairs(given: Iterable[str], alone: str) -> dict[str, str]:
    """``PAPER=OURS`` as a dictionary; a value by itself is for ``alone``."""
    found = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals and alone:
            name, value = alone, one
        if not name or not value:
            raise ValueError(f"{one!r} is no NAME=VALUE: such as caltech101=/data/caltech101")
        found[name] = value
    return found
