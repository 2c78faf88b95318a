"""Test a trained Diff-C on images or stored grids: accuracy, accuracy by class, confusion.

The classifier remembers its class names and how its grids were made, so that it needs only images.
Without labels it writes what it takes each image for, and no accuracy.

    revelio eval-diffc --model runs/diffc/final --data.source caltech101 --data.split test
    revelio eval-diffc --model runs/diffc/final --data.source my/photos --out runs/mine
    revelio eval-diffc --model runs/diffc/final --store runs/test/up_ft1-t25-empty-d0
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from revelio.bounds import Count, Device, Folder, OutFolder, Workers
from revelio.cli.diffc_inputs import open_readable
from revelio.data.config import DataConfig
from revelio.trust import printable

if TYPE_CHECKING:
    from torch import Tensor

    from revelio.data.dataset import ImageDataset
    from revelio.diffc.model import DiffC
    from revelio.diffc.sources import GridSource
    from revelio.outputs import Older

FILES = ("report.json", "predictions.jsonl", "confusion.png")


TEST = "test"


@dataclass(frozen=True)
class Config:
    """Settings of `revelio eval-diffc`."""

    model: str = "runs/diffc/final"
    """The classifier: the `final` folder of a run, or a hub id."""

    data: DataConfig = field(default_factory=lambda: DataConfig(split=TEST))
    """The images."""

    store: Folder | None = None
    """Stored grids (written with pool `none`) instead of images."""

    out: OutFolder = Path("runs/eval-diffc")
    """The folder to write `report.json`, `predictions.jsonl` and `confusion.png` to."""

    backbone: str | None = None
    """The backbone, where it lies elsewhere than in training; none: the one of training."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The number format the backbone runs in; none: the one of training."""

    batch_size: Count = 32
    """Images a pass."""

    device: Device = "auto"
    """`auto`, `cpu`, `cuda`, ..."""

    workers: Workers = 2
    """Threads that read pictures."""


def run(config: Config) -> None:
    """Test; see the module's docstring.

    Raises:
        ValueError: no such classifier, or images or grids that it can't take.
    """
    from revelio.outputs import check_replaceable, claimed

    check_replaceable(config.out, "eval-diffc", FILES, _older())
    with claimed(config.out):
        _test(config)


def _older() -> "Older":
    from revelio.outputs import Older

    return Older("report.json", _is_report, lambda found: FILES)


def _is_report(found: dict[str, Any]) -> bool:
    # A training's report counts its images by part.
    keys = {"model", "grids", "skipped", "images", "classes"}
    return keys <= set(found) and type(found["images"]) is int


def _test(config: Config) -> None:
    from revelio.diffc.inputs import portable
    from revelio.diffc.model import load_diffc
    from revelio.diffc.trained_on import load_trained_on
    from revelio.distributed import device_of

    model = load_diffc(config.model).to(device_of(config.device))
    print(f"Diff-C: {model.parameter_count():,} parameters, {model.classes} classes, all frozen")
    source, labels, made, skipped = _open(config, model)
    if source.shape[0] != model.channels:
        raise ValueError(
            f"these grids have {source.shape[0]} channels, the classifier takes {model.channels}: "
            "give grids of the layer it was trained on"
        )
    logits = _logits(model, source, config.batch_size)
    known = load_trained_on(config.model)
    trained = None if known is None else known.holds(source, made.get("dataset"))
    head = {"model": portable(config.model), "grids": made, "skipped": skipped}
    report = _write(config.out, model, source.ids, labels, logits, head, trained)
    _summary(config.out, report)
    print(_next(config, made))


def _next(config: Config, made: dict[str, Any]) -> str:
    """The classified layer as pictures."""
    from revelio.following import beside, flags, following

    data = [*flags(config.data, "data", "root"), "--data.source"]
    data += ["FOLDER" if config.store is not None else config.data.source]
    backbone = ["--backbone.name", made.get("backbone") or "BACKBONE"]
    timestep = made.get("timestep")
    layer = ["--layers", made.get("layer") or "LAYER", "--timesteps"]
    layer += [] if timestep is None else [timestep]
    return following("pca-maps", *data, *backbone, *layer, "--out", beside(config.out, "pca-maps"))


def _open(
    config: Config, model: DiffC
) -> tuple[GridSource, list[int] | None, dict[str, Any], list[str]]:
    """Grids, labels by the classifier's ids (None where there are none), provenance, what was skipped."""
    from revelio.diffc.inputs import (
        STORE_KEYS,
        can_be_made_again,
        live_grids,
        open_backbone,
        open_stores,
    )

    made = dict(model.grids)
    if config.store is not None:
        source, found = open_stores([config.store], memory_gb=0.5)
        for key in STORE_KEYS:
            if made.get(key) is not None and found[key] not in (None, made[key]):
                raise ValueError(
                    f"{config.store} holds {key} {found.get(key)}, the classifier was trained on "
                    f"{made[key]}: extract the grids it knows"
                )
        return source, _own_labels(model, found["classes"], source.labels), found, []
    if not can_be_made_again(made):
        raise ValueError(
            f"{config.model} was trained on stored grids, pooled or of an unknown model: "
            "give --store, made the same way"
        )
    changed = {"backbone": config.backbone, "dtype": config.dtype}
    made |= {key: value for key, value in changed.items() if value is not None}
    dataset, skipped = _open_images(config.data)
    labels = None
    if dataset.labels is not None:
        labels = _own_labels(model, dataset.classes, dataset.labels)
    try:
        backbone = open_backbone(made, config.device, imports=config.backbone is not None)
    except (KeyError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise ValueError(
            f"{reason} (the classifier was trained on it: --backbone says where it lies)"
        ) from error
    shown = made | {"dataset": dataset.name, "split": dataset.split}
    source = live_grids(_labelled(dataset), backbone, made, config.device, config.workers)
    return source, labels, shown, skipped


def _open_images(data: DataConfig) -> tuple[ImageDataset, list[str]]:
    """The images; all of them where there are no splits to choose from."""
    from revelio.data.splits import NoSplits

    try:
        return open_readable(data)
    except NoSplits:
        if data.split != TEST:
            raise
        found = open_readable(replace(data, split=None))
    print(f"{printable(found[0].name)} has no splits: all {len(found[0]):,} images are taken")
    return found


def _labelled(dataset: ImageDataset) -> ImageDataset:
    """A source has labels: unlabelled images get zeros, which nothing reads."""
    return dataset if dataset.labels is not None else replace(dataset, labels=[0] * len(dataset))


def _own_labels(model: DiffC, classes: Any, labels: Any) -> list[int]:
    """The data's class ids as the classifier's, by name.

    Raises:
        ValueError: the data has a class that the classifier doesn't know.
    """
    known = {name: number for number, name in enumerate(model.class_names)}
    missing = [name for name in classes if name not in known]
    if missing:
        raise ValueError(
            f"the classifier doesn't know {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}: its {model.classes} classes are "
            f"{', '.join(model.class_names[:5])} ..."
        )
    return [known[classes[label]] for label in labels]


def _logits(model: DiffC, source: GridSource, batch_size: int) -> Tensor:
    import torch
    from tqdm import tqdm

    from revelio.diffc.sources import PLAIN, chunks

    device = next(model.parameters()).device
    parts = []
    with tqdm(total=len(source.ids), desc="testing", unit="image") as bar, torch.no_grad():
        for batch in chunks(range(len(source.ids)), batch_size):
            parts.append(model(source.grids(batch, PLAIN).to(device)).cpu())
            bar.update(len(batch))
    return torch.cat(parts)


def _write(
    out: Path,
    model: DiffC,
    ids: Any,
    labels: list[int] | None,
    logits: Tensor,
    head: dict[str, Any],
    trained: list[bool] | None,
) -> dict[str, Any]:
    """Predictions of all images; measures of those that the classifier was not trained on, if any."""
    import json

    import torch

    from revelio.diffc.measures import confusion, measure
    from revelio.diffc.picture import confusion_png
    from revelio.outputs import replace_files
    from revelio.run_dir import write_json

    shares, found = logits.softmax(dim=1).max(dim=1)
    names = model.class_names
    lines = [
        {"id": name, "predicted": names[guess], "probability": round(share, 6)}
        | ({} if labels is None else {"label": names[labels[row]]})
        | ({"trained_on": True} if trained is not None and trained[row] else {})
        for row, (name, guess, share) in enumerate(
            zip(ids, found.tolist(), shares.tolist(), strict=True)
        )
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    report = head | {"images": len(lines), "classes": list(names)}
    picture = None
    seen = torch.tensor(trained or [False] * len(lines))
    count, left_out = int(seen.sum()), labels is not None and not bool(seen.all())
    report["trained_on"] = None if trained is None else {"images": count, "left_out": left_out}
    if labels is not None:
        kept = ~seen if left_out else torch.ones_like(seen)
        truth, found = torch.tensor(labels)[kept], found[kept]
        report |= measure(truth, found, names)
        counts = confusion(truth, found, len(names))
        report["confusion"] = counts.tolist()
        picture = confusion_png(counts, names)

    def fill(folder: Path) -> None:
        (folder / "predictions.jsonl").write_bytes(text.encode(errors="backslashreplace"))
        if picture is not None:
            (folder / "confusion.png").write_bytes(picture)
        write_json(folder / "report.json", report)

    replace_files(out, "eval-diffc", fill, older=_older())
    return report


def _summary(out: Path, report: dict[str, Any]) -> None:
    seen = report["trained_on"] or {"images": 0, "left_out": False}
    if seen["left_out"] and seen["images"]:
        print(f"{seen['images']:,} images are left out: the classifier was trained on them")
    elif seen["images"]:
        print(f"this is no test: the classifier was trained on {seen['images']:,} of these images")
    if "top1" not in report:
        print("these images have no labels: predictions only, no accuracy")
    else:
        low, high = report["wilson95"]
        print(
            f"top-1 on {report['images']:,} images: {report['top1']:.2%} [{low:.2%}, {high:.2%}] "
            f"(Wilson's 95 % interval), mean of classes {report['class_mean']:.2%}"
        )
        worst = sorted(report["per_class"], key=lambda row: row["accuracy"])[:3]
        print(
            "hardest: "
            + ", ".join(f"{printable(row['name'])} {row['accuracy']:.0%}" for row in worst)
        )
    print(f"written: {out / 'report.json'}, {out / 'predictions.jsonl'}")
