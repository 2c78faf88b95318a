"""The paper's items as data: an item is rows (axes x values over one base), a title, and what it claims.

Rows of the tables are those of ``paper_experiments.csv``; figures are products of axes, with the paper's
value where a table has the same cell.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from io import StringIO
from itertools import product
from typing import Any

from revelio.reproduce.orderings import Ordering
from revelio.reproduce.row import CALTECH, FGVC, PETS, SECONDS, TOP1, Row
from revelio.wording import did_you_mean

# The paper's spelling -> a prompt policy.
_POLICIES = {"from_CLIP": "from_clip", "null-class": "empty"}
# Rows of Table 5 and Sec. 4.7 that are runs of other tables, or of a zero-shot classifier.
_BASELINES: dict[str, dict[str, Any]] = {
    "diff-c up_ft1 empty": {"layer": "up_ft1", "timestep": 25, "prompt": "empty"},
    "diff-c up_ft1 from_CLIP": {"layer": "up_ft1", "timestep": 100, "prompt": "from_clip"},
    "diff-c": {"prompt": "empty"},
}
# At which timestep its grids were taken the papers don't say: at the main one here.
_BASELINES["sd-2.0 features (resnet probe)"] = {
    "kind": "resnet",
    "model": "sd-2.0",
    "layer": "bottleneck",
    "timestep": 25,
    "prompt": "empty",
}
_ZERO_SHOT = {
    "diffusion-classifier sd-2.0": "diffusion-classifier",
    "clip rn50": "clip",
    "openclip vit-h/14": "clip",
}


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
    if row.kind == "vlm":  # layer and timestep are its tower's, and in its name
        return replace(row, layer="", timestep=None)
    if row.kind not in ("baseline", "speed"):
        return row
    if row.model in _BASELINES:
        return replace(row, **({"kind": "diffc", "model": "sd-1.5"} | _BASELINES[row.model]))
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
        hint = did_you_mean(name, items())
        raise KeyError(f"unknown item {name!r}: {hint}choose from {', '.join(items())}")
    return items()[name]


@cache
def items() -> dict[str, Item]:
    """All of them, in the paper's order."""
    paper = paper_rows()
    found = {
        name: Item(
            title, tuple(row for part in parts for row in paper[part]), _CLAIMS.get(name, ())
        )
        for name, (title, *parts) in _TABLES.items()
    }
    found |= {name: replace(found[name], commands=commands) for name, commands in _COMMANDS.items()}
    found["table5"] = replace(found["table5"], rows=found["table5"].rows + _beside_diffc())
    for name, (title, kind, axes) in _FIGURES.items():
        found[name] = Item(title, _rows(kind, _METRICS[kind], **axes))
    return found


def _beside_diffc() -> tuple[Row, ...]:
    """Baselines and seconds an image that the paper has no number of, beside Diff-C on the same pictures."""
    probes = product(("linear", "knn", "attention"), (TOP1, SECONDS))
    found = [row for kind, metric in probes for row in _rows(kind, metric)]
    found += _rows("resnet", SECONDS, model=("sd-2.0",), layer=("bottleneck",))
    clip = {"model": ("openclip vit-h/14",), "layer": ("",), "timestep": (None,), "prompt": ("",)}
    return (*found, *_rows("clip", SECONDS, **clip))


# A title, and the items of the CSV that have its numbers.
_TABLES = {
    "table2a": ("sigma_label of k-SAEs by layer, t = 25", "table2a"),
    "table2b": ("sigma_label of k-SAEs by timestep", "table2b"),
    "table2c": ("sigma_label of k-SAEs: SD-1.5 and SD-2.1", "table2c"),
    "table2d": ("sigma_label of k-SAEs by block of DiT, t = 25", "table2d"),
    "table3": ("Diff-C on Pets by model, layer and timestep", "table3"),
    "table4": ("Vision-language models with a diffusion tower", "table4/table10"),
    "table5": ("Diff-C and zero-shot classifiers; seconds an image (4.7)", "table5", "sec4.7"),
    "table6": ("Diff-C on FGVC-Aircraft by timestep, layer and prompt", "table6"),
    "table7": ("Diff-C on Pets by timestep, layer and prompt", "table7"),
    "table8": ("Diff-C on Caltech-101 by timestep, layer and prompt", "table8"),
    "table9": ("Diff-C on Pets by prompt", "table9"),
    "table10": ("Table 4 by category of question: the same runs",),
    "table11": ("Hyper-parameters of the vision-language models",),
}

# LLaVA-Bench of the four models, made by the LLaVA extension.
_TRAIN = tuple(
    f"revelio llava {part} --config configs/llava/{towers}.yaml"
    for towers in ("clip", "clip-dinov2", "clip-sd-t25", "clip-sd-t200")
    for part in ("cache", "pretrain", "finetune")
)
_ASK = tuple(f"revelio llava-bench {part}" for part in ("answer", "judge", "score"))
_COMMANDS = {"table4": _TRAIN + _ASK, "table10": _TRAIN + _ASK, "table11": _TRAIN}

_LAYERS = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
_BLOCKS = tuple(f"block{number}" for number in (6, 10, 14, 18, 22))
_ALL = (PETS, CALTECH, FGVC)
_METRICS = {"gallery": "sigma_label@1000", "diffc": TOP1, "pca": ""}
_THREE = {"layer": ("bottleneck", "up_ft1", "up_ft2")}
_MAPS = {"model": ("sd-1.5",), "layer": ("+".join(_LAYERS),), "dataset": ("unrel",)}
_FIGURES: dict[str, tuple[str, str, dict[str, tuple[Any, ...]]]] = {
    "figure1": ("Top images, Pets, three layers: the strongest latents", "gallery", _THREE),
    "figure2": ("Top images, Pets, three layers: random latents", "gallery", _THREE),
    "figure3": ("Top images, Pets, three layers: more of the strongest", "gallery", _THREE),
    "figure4": ("Diff-C by layer, t = 25", "diffc", {"layer": _LAYERS, "dataset": _ALL}),
    "figure5": (
        "Top images, Caltech-101",
        "gallery",
        {"layer": ("bottleneck", "up_ft1"), "dataset": (CALTECH,)},
    ),
    "figure6": (
        "Diff-C by timestep, up_ft1",
        "diffc",
        {"timestep": (0, 25, 100, 200, 300, 500), "dataset": _ALL},
    ),
    "figure7": ("Top images, Pets, SD-2.1 up_ft1", "gallery", {"model": ("sd-2.1",)}),
    "figure8": (
        "Diff-C: SD-1.5 and DeepFloyd-IF by layer, t = 25",
        "diffc",
        {"model": ("sd-1.5", "if-i-l"), "layer": _LAYERS[:3], "dataset": (PETS, CALTECH)},
    ),
    "figure9": (
        "Top images, Pets, blocks of DiT",
        "gallery",
        {"model": ("dit-xl-2-512",), "layer": _BLOCKS},
    ),
    "figure10": ("PCA maps, UnRel, four layers", "pca", _MAPS),
}


def _beats_layers(margin: float) -> tuple[Ordering, Ordering]:
    text = "(iv) with the empty prompt up_ft1 beats every other layer at every timestep"
    one = Ordering(text, "most", "layer", "up_ft1", where={"prompt": "empty"})
    return one, replace(one, text=f"{text}, by {margin:g} points", margin=margin)


_ON_PETS, _ON_CALTECH = {"dataset": PETS}, {"dataset": CALTECH}
_CLIP_HELPS = Ordering(
    "(v) from_clip beats the empty prompt at every layer and timestep",
    "most",
    "prompt",
    "from_clip",
)
_VLMS = {"metric": "relative", "dataset": "llava-bench-wild:all"}
_T200 = "mpt-7b-chat + clip+sd1.5 t=200"
# SPEC section 10, and what the text says of Tables 2c and 3.
_CLAIMS: dict[str, tuple[Ordering, ...]] = {
    "table2a": (
        Ordering("(i) up_ft1 is purest on Pets", "least", "layer", "up_ft1", where=_ON_PETS),
        Ordering(
            "(i) bottleneck is purest on Caltech-101",
            "least",
            "layer",
            "bottleneck",
            where=_ON_CALTECH,
        ),
        Ordering(
            "(ii) sigma_label rises with depth on Caltech-101", "rising", "layer", where=_ON_CALTECH
        ),
    ),
    "table2b": (
        Ordering("(iii) t = 25 is purest on Pets", "least", "timestep", 25, where=_ON_PETS),
        Ordering(
            "(iii) t = 200 is purest on Caltech-101", "least", "timestep", 200, where=_ON_CALTECH
        ),
    ),
    "table2c": (Ordering("SD-1.5 is purer than SD-2.1", "least", "model", "sd-1.5"),),
    "table2d": (Ordering("(vi) the middle block, 14, is purest", "least", "layer", "block14"),),
    "table3": (
        Ordering("t = 25 beats t = 200 for every model and layer", "most", "timestep", 25),
        Ordering(
            "up_ft1 beats the bottleneck of every U-Net",
            "most",
            "layer",
            "up_ft1",
            skip="dit-xl-2-512",
        ),
        Ordering(
            "(vi) block 14 of DiT beats block 10",
            "most",
            "layer",
            "block14",
            where={"model": "dit-xl-2-512"},
        ),
    ),
    "table6": (
        *_beats_layers(11),
        Ordering("(v) from_clip helps some cells and hurts others", "mixed", "prompt", "from_clip"),
    ),
    "table7": (*_beats_layers(6), _CLIP_HELPS),
    "table8": (_CLIP_HELPS,),
    "table4": (
        Ordering(
            "(vii) CLIP with SD's tower at t = 25 beats CLIP alone and CLIP with DINOv2",
            "most",
            "model",
            "mpt-7b-chat + clip+sd1.5 t=25",
            where=_VLMS,
            skip=_T200,
        ),
        Ordering(
            "(vii) CLIP with DINOv2 is below CLIP alone, and below CLIP with SD's tower",
            "least",
            "model",
            "mpt-7b-chat + clip+dinov2",
            where=_VLMS,
            skip=_T200,
        ),
    ),
}
