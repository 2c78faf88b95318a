"""The paper's items as data: an item is rows (axes x values over one base), a title, and what it claims.

Rows of the tables are those of ``paper_experiments.csv``; figures are products of axes, with the paper's
value where a table has the same cell.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from io import StringIO
from itertools import product
from typing import Any

from revelio.reproduce.orderings import Ordering

PETS, CALTECH, FGVC = "oxford-iiit-pet", "caltech101", "fgvc-aircraft"
TOP1, DELTA, SECONDS = "top1", "delta_top1", "s_per_image"
AXES = ("kind", "model", "layer", "timestep", "dataset", "prompt")
# The paper's spelling -> a prompt policy.
_POLICIES = {"from_CLIP": "from_clip", "null-class": "empty"}
# Rows of Table 5 and Sec. 4.7 that are runs of other tables, or of a zero-shot classifier.
_BASELINES: dict[str, dict[str, Any]] = {
    "diff-c up_ft1 empty": {"layer": "up_ft1", "timestep": 25, "prompt": "empty"},
    "diff-c up_ft1 from_CLIP": {"layer": "up_ft1", "timestep": 100, "prompt": "from_clip"},
    "diff-c": {"prompt": "empty"},
}
_ZERO_SHOT = {
    "diffusion-classifier sd-2.0": "diffusion-classifier",
    "clip rn50": "clip",
    "openclip vit-h/14": "clip",
}


@dataclass(frozen=True)
class Row:
    """One cell of a table, or one panel of a figure.

    Attributes:
        kind: ``ksae`` (purity of a k-SAE), ``gallery`` (its top images too), ``diffc``, ``pca``, ``clip``,
            ``diffusion-classifier``, ``quoted`` (from other work, with no counterpart here), ``vlm``.
        model: the paper's name.
        layer: of the model; of PCA maps several, with ``+`` between.
        timestep: the model's own; None: a row without noise.
        dataset: by the name that :mod:`revelio.data` knows it under.
        prompt: a prompt policy.
        metric: what ``paper`` is.
        paper: the paper's value; None: a figure's.
        note: of whoever typed the numbers in.
    """

    kind: str
    model: str
    layer: str
    timestep: int | None
    dataset: str
    prompt: str
    metric: str
    paper: float | None = field(default=None, compare=False)
    note: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The row in words."""
        t = "" if self.timestep is None else f"t={self.timestep}"
        parts = (self.model, self.layer, t, self.dataset, self.prompt)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Item:
    """A table or figure.

    Attributes:
        title: what it shows.
        rows: its cells.
        orderings: what the paper claims of them (SPEC section 10, i to vii).
        commands: what makes it instead, where it is not made by the pipelines of this package.
    """

    title: str
    rows: tuple[Row, ...] = ()
    orderings: tuple[Ordering, ...] = ()
    commands: tuple[str, ...] = ()


@cache
def paper_rows() -> dict[str, tuple[Row, ...]]:
    """Every number of the paper, by the item that the CSV names."""
    text = (files("revelio.reproduce") / "paper_experiments.csv").read_text("utf-8")
    found: dict[str, list[Row]] = {}
    for line in csv.DictReader(StringIO(text)):
        found.setdefault(line["item"], []).append(_row(line))
    return {item: tuple(rows) for item, rows in found.items()}


def _row(line: Mapping[str, str]) -> Row:
    row = Row(
        line["kind"],
        line["model"],
        line["layer"],
        int(line["t"]) if line["t"] else None,
        line["dataset"],
        _POLICIES.get(line["prompt"], line["prompt"]),
        line["metric"],
        float(line["paper_value"]),
        line["note"],
    )
    if row.kind not in ("baseline", "speed"):
        return row
    if row.model in _BASELINES:
        return replace(row, kind="diffc", model="sd-1.5", **_BASELINES[row.model])
    return replace(row, kind=_ZERO_SHOT.get(row.model, "quoted"))


def _rows(kind: str, metric: str, **axes: tuple[Any, ...]) -> tuple[Row, ...]:
    """The product of the axes; values of an axis left out are the paper's main setting."""
    main: dict[str, tuple[Any, ...]] = {"model": ("sd-1.5",), "layer": ("up_ft1",)}
    main |= {"timestep": (25,), "dataset": (PETS,), "prompt": ("empty",)}
    known = {row: row.paper for rows in reversed(paper_rows().values()) for row in rows}
    found = []
    for model, layer, timestep, dataset, prompt in product(*(main | axes).values()):
        row = Row(kind, model, layer, timestep, dataset, prompt, metric)
        tabled = replace(row, kind="ksae") if kind == "gallery" else row
        found.append(replace(row, paper=known.get(tabled)))
    return tuple(found)


def item(name: str) -> Item:
    """The item of a name.

    Raises:
        KeyError: there is none; lists the known ones.
    """
    if name not in items():
        raise KeyError(f"unknown item {name!r}: choose from {', '.join(items())}")
    return items()[name]


LAYERS = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
_CLIP_HELPS = "from_clip beats the empty prompt at every layer and timestep"


def _prompts_and_layers(name: str, title: str, dataset: str, *own: Ordering) -> tuple[str, Item]:
    at = f"Diff-C on {title}: timesteps x layers x prompts"
    return name, Item(at, paper_rows()[name], tuple(replace(one, dataset=dataset) for one in own))


def _layer(margin: float) -> tuple[Ordering, ...]:
    """Claim iv: up_ft1 beats all other layers, at every timestep."""
    empty = {"prompt": "empty"}
    text = "(iv) with the empty prompt up_ft1 beats every other layer at every timestep"
    return (
        Ordering(text, "most", "layer", "up_ft1", where=empty),
        Ordering(f"{text}, by {margin:g} points", "most", "layer", "up_ft1", margin, where=empty),
    )


@cache
def items() -> dict[str, Item]:
    """All of them, in the paper's order."""
    paper = paper_rows()
    pets, caltech = {"dataset": PETS}, {"dataset": CALTECH}
    mid = Ordering("(vi) the middle block, 14, is purest", "least", "layer", "block14")
    clip = Ordering(f"(v) {_CLIP_HELPS}", "most", "prompt", "from_clip")
    mixed = Ordering(
        "(v) from_clip helps some cells and hurts others", "mixed", "prompt", "from_clip"
    )
    sigma, top1 = "sigma_label@1000", TOP1
    towers = ("clip", "clip-dinov2", "clip-sd-t25", "clip-sd-t200")
    llava = (
        *(
            f"revelio llava {part} --config configs/llava/{one}.yaml"
            for one in towers
            for part in STAGES
        ),
        "revelio llava-bench answer, then judge, then score (one run each; score compares them)",
    )
    dits = tuple(f"block{number}" for number in (6, 10, 14, 18, 22))
    return {
        "table2a": Item(
            "sigma_label of k-SAEs by layer, t = 25",
            paper["table2a"],
            (
                Ordering("(i) up_ft1 is purest on Pets", "least", "layer", "up_ft1", where=pets),
                Ordering(
                    "(i) the bottleneck is purest on Caltech-101",
                    "least",
                    "layer",
                    "bottleneck",
                    where=caltech,
                ),
                Ordering(
                    "(ii) sigma_label rises with depth on Caltech-101",
                    "rising",
                    "layer",
                    where=caltech,
                ),
            ),
        ),
        "table2b": Item(
            "sigma_label of k-SAEs by timestep",
            paper["table2b"],
            (
                Ordering("(iii) t = 25 is purest on Pets", "least", "timestep", 25, where=pets),
                Ordering(
                    "(iii) t = 200 is purest on Caltech-101",
                    "least",
                    "timestep",
                    200,
                    where=caltech,
                ),
            ),
        ),
        "table2c": Item(
            "sigma_label of k-SAEs: SD-1.5 and SD-2.1",
            paper["table2c"],
            (Ordering("SD-1.5 is purer than SD-2.1", "least", "model", "sd-1.5"),),
        ),
        "table2d": Item("sigma_label of k-SAEs by block of DiT", paper["table2d"], (mid,)),
        "table3": Item(
            "Diff-C on Pets by model, layer and timestep",
            paper["table3"],
            (
                Ordering("t = 25 beats t = 200 for every model and layer", "most", "timestep", 25),
                Ordering(
                    "up_ft1 beats the bottleneck of every U-Net",
                    "most",
                    "layer",
                    "up_ft1",
                    skip="dit-xl-2-512",
                ),
                Ordering(
                    "(vi) DiT's block 14 beats block 10",
                    "most",
                    "layer",
                    "block14",
                    where={"model": "dit-xl-2-512"},
                ),
            ),
        ),
        "table4": Item(
            "Vision-language models with a diffusion tower: LLaVA-Bench (in the wild)",
            paper["table4/table10"],
            commands=llava,
        ),
        "table5": Item(
            "Diff-C, the Diffusion Classifier and CLIP; seconds an image (Sec. 4.7)",
            (*paper["table5"], *paper["sec4.7"]),
        ),
        **dict(
            [
                _prompts_and_layers("table6", "FGVC-Aircraft", FGVC, *_layer(11), mixed),
                _prompts_and_layers("table7", "Pets", PETS, *_layer(6), clip),
                _prompts_and_layers("table8", "Caltech-101", CALTECH, clip),
            ]
        ),
        "table9": Item("Diff-C on Pets by prompt", paper["table9"]),
        "table10": Item("Table 4 by category of question: the same runs", commands=llava),
        "table11": Item("Hyper-parameters of the vision-language models", commands=llava[:-1]),
        "figure1": Item("Top images, Pets, SD-1.5 up_ft1", _rows("gallery", sigma)),
        "figure2": Item(
            "Top images, Pets, three layers",
            _rows("gallery", sigma, layer=("bottleneck", "up_ft1", "up_ft2")),
        ),
        "figure3": Item(
            "Top images, Pets, three layers",
            _rows("gallery", sigma, layer=("bottleneck", "up_ft1", "up_ft2")),
        ),
        "figure4": Item(
            "Diff-C by layer, t = 25",
            _rows("diffc", top1, layer=LAYERS, dataset=(PETS, CALTECH, FGVC)),
        ),
        "figure5": Item(
            "Top images, Caltech-101",
            _rows("gallery", sigma, layer=("bottleneck", "up_ft1"), dataset=(CALTECH,)),
        ),
        "figure6": Item(
            "Diff-C by timestep, up_ft1",
            _rows(
                "diffc", top1, timestep=(0, 25, 100, 200, 300, 500), dataset=(PETS, CALTECH, FGVC)
            ),
        ),
        "figure7": Item(
            "Top images, Pets, SD-2.1 up_ft1", _rows("gallery", sigma, model=("sd-2.1",))
        ),
        "figure8": Item(
            "Diff-C: SD-1.5 and DeepFloyd-IF by layer, t = 25",
            _rows(
                "diffc", top1, model=("sd-1.5", "if-i-l"), layer=LAYERS[:3], dataset=(PETS, CALTECH)
            ),
        ),
        "figure9": Item(
            "Top images, Pets, blocks of DiT",
            _rows("gallery", sigma, model=("dit-xl-2-512",), layer=dits),
        ),
        "figure10": Item(
            "PCA maps, UnRel",
            _rows("pca", "", layer=("+".join(LAYERS),), dataset=("unrel",))
            + _rows(
                "pca", "", model=("dit-xl-2-512",), layer=("+".join(dits),), dataset=("unrel",)
            ),
        ),
    }


STAGES = ("cache", "pretrain", "finetune")
