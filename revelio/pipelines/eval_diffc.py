"""Diff-C + images or stored grids -> accuracy, accuracy by class, confusion, and a line an image.

from revelio.pipelines.eval_diffc import EvalDiffCConfig, eval_diffc

report = eval_diffc(EvalDiffCConfig(diffc="runs/diffc/final", data=DataConfig(source="my/photos")))
report["top1"], report["wilson95"]

The classifier remembers its class names, how its grids were made and what it was trained on; images that it
was trained on are left out of the accuracy. Without labels there are predictions and no accuracy.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revelio.bounds import check_fields
from revelio.data.config import DataConfig
from revelio.data.dataset import ImageDataset
from revelio.data.loading import mendable
from revelio.data.splits import NoSplits
from revelio.diffc.config import EvalDiffCConfig, GridsConfig, TestConfig
from revelio.diffc.inputs import (
    STORE_KEYS,
    can_be_made_again,
    live_grids,
    open_backbone,
    open_images,
    open_stores,
    portable,
)
from revelio.diffc.measures import confusion, confusion_png, measure
from revelio.diffc.model import DiffC, load_diffc
from revelio.diffc.sources import GridSource, chunks
from revelio.diffc.train import predict
from revelio.diffc.trained_on import load_trained_on
from revelio.distributed import device_of
from revelio.outputs import Older, check_replaceable, claimed, replace_files
from revelio.pipelines import Progress, Report, counted, silent
from revelio.pipelines.inputs import check_same_source, weights_sha256
from revelio.run_dir import write_json
from revelio.trust import printable
from revelio.wording import plural

__all__ = ["EvalDiffCConfig", "eval_diffc"]

FILES = ("report.json", "predictions.jsonl", "confusion.png")


@dataclass(frozen=True)
class _Opened:
    """What a classifier is tested on.

    Attributes:
        source: the grids.
        labels: by the classifier's class ids; None where there are none.
        made: how the grids were made, and the data set.
        skipped: one line on each image that could not be read.
    """

    source: GridSource
    labels: list[int] | None
    made: dict[str, Any]
    skipped: list[str] = field(default_factory=list)


@mendable()
def eval_diffc(config: EvalDiffCConfig, progress: Report = silent) -> dict[str, Any]:
    """Test a classifier and write what was found into ``config.out``.

    Args:
        config: which classifier, on what, and where to.
        progress: told what is opened, every batch, and the result.

    Returns:
        What `report.json` holds: the measures of :func:`revelio.diffc.measures.measure` where there are
        labels, ``confusion``, ``grids`` (how they were made), ``trained_on``, ``skipped``.

    Raises:
        ValueError: a value is outside its bounds, no such classifier, images or grids that it can't take, or
            the folder holds something else: also the report of another classifier, or on other images.
    """
    check_fields(config)
    older = Older("report.json", _is_report, lambda found: FILES)
    check_replaceable(config.out, "eval-diffc", FILES, older)
    with claimed(config.out):
        model = load_diffc(config.diffc).to(device_of(config.device))
        parameters = plural(model.parameter_count(), "parameter")
        classes = plural(model.classes, "class", "classes")
        progress(Progress(f"Diff-C: {parameters}, {classes}, all frozen"))
        opened = _open(config, model, progress)
        if opened.source.shape[0] != model.channels:
            raise ValueError(
                f"these grids have {plural(opened.source.shape[0], 'channel')}, the classifier takes "
                f"{model.channels}: give grids of the layer it was trained on"
            )
        head = {"model": portable(config.diffc), "sha256": weights_sha256(config.diffc)}
        head |= {"grids": opened.made, "skipped": opened.skipped}
        check_same_source(
            config.out / "report.json",
            _made_as,
            _made_as(head | {"images": len(opened.source.ids)}),
        )
        logits = _logits(model, opened.source, config.batch_size, progress)
        known = load_trained_on(config.diffc)
        seen = known and known.holds(opened.source, opened.made.get("dataset"))
        shares, found = logits.softmax(dim=1).max(dim=1)
        report = head | _measured(model, opened, found, seen)

        def fill(folder: Path) -> None:
            text = "".join(_lines(model, opened, found, shares, seen))
            (folder / "predictions.jsonl").write_bytes(text.encode(errors="backslashreplace"))
            if "confusion" in report:
                counts = torch.tensor(report["confusion"])
                (folder / "confusion.png").write_bytes(confusion_png(counts, model.class_names))
            write_json(folder / "report.json", report)

        replace_files(config.out, "eval-diffc", fill, older=older)
    progress(Progress(_summary(config.out, report)))
    return report


def _is_report(found: dict[str, Any]) -> bool:
    # A training's report counts its images by part.
    keys = {"model", "grids", "skipped", "images", "classes"}
    return keys <= set(found) and type(found["images"]) is int


def _made_as(report: dict[str, Any]) -> str | None:
    """What a report was made from, to be compared; None: it does not say."""
    if "sha256" not in report:
        return None
    weights, seen = report["sha256"] or report["model"], report.get("trained_on") or {}
    images = report["images"] + (seen["images"] if seen.get("left_out") else 0)
    return json.dumps([weights, report["grids"], images], sort_keys=True)


def _open(config: EvalDiffCConfig, model: DiffC, progress: Report) -> _Opened:
    made = dict(model.grids)
    if config.store is not None:
        source, found = open_stores([config.store], memory_gb=0.5)
        for key in STORE_KEYS:
            if made.get(key) is not None and found[key] not in (None, made[key]):
                raise ValueError(
                    f"{config.store} holds {key} {found.get(key)}, the classifier was trained on "
                    f"{made[key]}: extract the grids it knows"
                )
        return _Opened(source, _own_labels(model, found["classes"], source.labels), found)
    if not can_be_made_again(made):
        raise ValueError(
            f"{config.diffc} was trained on stored grids, pooled or of an unknown model: "
            "give a store, made the same way"
        )
    changed = {"backbone": config.backbone, "dtype": config.dtype}
    made |= {key: value for key, value in changed.items() if value is not None}
    dataset, skipped = _open_images(config.data, progress)
    labels = None
    if dataset.labels is not None:
        labels = _own_labels(model, dataset.classes, dataset.labels)
    grids = GridsConfig.of(made, config.device)
    try:
        backbone = open_backbone(grids, imports=config.backbone is not None)
    except (KeyError, ValueError) as error:
        reason = error.args[0] if error.args else error
        trained = f"the classifier was trained on {printable(model.grids.get('backbone'))}"
        asked = (
            "`backbone` says where it lies"
            if config.backbone is None
            else "give `backbone` as that"
        )
        raise ValueError(f"{reason} ({trained}: {asked})") from error
    # A source has labels: unlabelled images get zeros, which nothing reads.
    labelled = replace(dataset, labels=dataset.labels or [0] * len(dataset))
    source = live_grids(labelled, backbone, grids, config.workers)
    return _Opened(
        source, labels, made | {"dataset": dataset.name, "split": dataset.split}, skipped
    )


def _open_images(data: DataConfig, progress: Report) -> tuple[ImageDataset, list[str]]:
    """The images; all of them where there are no splits to choose from."""
    try:
        return open_images(data)
    except NoSplits:
        if data.split != TestConfig.split:
            raise
    found = open_images(replace(data, split=None))
    name = printable(found[0].name)
    progress(Progress(f"{name} has no splits: all {plural(len(found[0]), 'image')} are taken"))
    return found


def _own_labels(model: DiffC, classes: Sequence[str], labels: Sequence[int]) -> list[int]:
    """The data's class ids as the classifier's, by name.

    Raises:
        ValueError: the data has a class that the classifier doesn't know.
    """
    known = {name: number for number, name in enumerate(model.class_names)}
    missing = [name for name in classes if name not in known]
    if missing:
        more = ", ..." if model.classes > 5 else ""
        raise ValueError(
            f"the classifier doesn't know {', '.join(missing[:5])}"
            f"{' and others' if len(missing) > 5 else ''}: its "
            f"{plural(model.classes, 'class is', 'classes are')} {', '.join(model.class_names[:5])}{more}: "
            "give pictures of those, or, for predictions alone, pictures without class folders or labels"
        )
    return [known[classes[label]] for label in labels]


def _logits(model: DiffC, source: GridSource, batch_size: int, progress: Report) -> Tensor:
    everyone, parts = range(len(source.ids)), []
    told = counted(progress, "testing", len(everyone), "image")
    for batch in chunks(everyone, batch_size):
        parts.append(predict(model, source, batch, batch_size))
        told(len(batch))
    return torch.cat(parts)


def _measured(
    model: DiffC, opened: _Opened, found: Tensor, trained: list[bool] | None
) -> dict[str, Any]:
    """Measures of the images that the classifier was not trained on, if there are any."""
    names, count = model.class_names, len(opened.source.ids)
    seen = torch.tensor(trained or [False] * count)
    left_out = opened.labels is not None and not bool(seen.all())
    report: dict[str, Any] = {"images": count, "classes": list(names)}
    report["trained_on"] = (
        None if trained is None else {"images": int(seen.sum()), "left_out": left_out}
    )
    if opened.labels is None:
        return report
    kept = ~seen if left_out else torch.ones_like(seen)
    truth, found = torch.tensor(opened.labels)[kept], found[kept]
    report |= measure(truth, found, names)
    return report | {"confusion": confusion(truth, found, len(names)).tolist()}


def _lines(
    model: DiffC, opened: _Opened, found: Tensor, shares: Tensor, trained: list[bool] | None
) -> list[str]:
    names, lines = model.class_names, []
    rows = zip(opened.source.ids, found.tolist(), shares.tolist(), strict=True)
    for row, (name, guess, share) in enumerate(rows):
        line = {"id": name, "predicted": names[guess], "probability": round(share, 6)}
        line |= {} if opened.labels is None else {"label": names[opened.labels[row]]}
        line |= {"trained_on": True} if trained is not None and trained[row] else {}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def _summary(out: Path, report: dict[str, Any]) -> str:
    lines = []
    seen = report["trained_on"] or {"images": 0, "left_out": False}
    if seen["left_out"] and seen["images"]:
        lines.append(
            f"{plural(seen['images'], 'image is', 'images are')} left out: the classifier was trained on them"
        )
    elif seen["images"]:
        lines.append(
            f"this is no test: the classifier was trained on {seen['images']:,} of these images"
        )
    if "top1" not in report:
        lines.append("these images have no labels: predictions only, no accuracy")
    else:
        low, high = report["wilson95"]
        lines.append(
            f"top-1 on {plural(report['images'], 'image')}: {report['top1']:.2%} [{low:.2%}, {high:.2%}] "
            f"(Wilson's 95 % interval), mean of classes {report['class_mean']:.2%}"
        )
        worst = sorted(report["per_class"], key=lambda row: row["accuracy"])[:3]
        named = (f"{printable(row['name'])} {row['accuracy']:.0%}" for row in worst)
        lines.append("hardest: " + ", ".join(named))
    made = FILES if "confusion" in report else FILES[:2]
    lines.append(f"written: {', '.join(str(out / name) for name in made)}")
    return "\n".join(lines)
