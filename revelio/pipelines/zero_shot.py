"""Images with class names -> what a model that never saw them makes of them, one line an image.

from revelio.pipelines.zero_shot import ZeroShotConfig, zero_shot

found = zero_shot(ZeroShotConfig(method="clip", data=DataConfig(source="my/photos"), out=Path("runs/clip")))
found.report["value"], found.report["seconds"]

An image's line does not depend on what else is classified, so a stopped run goes on with the images that have
no line yet.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from time import perf_counter
from typing import Any, cast

from revelio.backbones.base import DiffusionModel, schedule_of
from revelio.backbones.prompts import ZeroShot, class_texts
from revelio.backbones.registry import load_backbone
from revelio.bounds import check_fields
from revelio.data.dataset import ImageDataset
from revelio.data.loading import mendable
from revelio.diffc.inputs import open_images
from revelio.pipelines import Report, Reported, counted, silent
from revelio.pipelines.inputs import begins, open_run
from revelio.probes.config import ZeroShotConfig
from revelio.probes.diffusion_classifier import diffusion_classifier
from revelio.probes.score import score
from revelio.run_dir import Run, versions, write_json
from revelio.trust import printable, read_json_lines, read_object
from revelio.wording import plural

__all__ = ["ZeroShotConfig", "ZeroShotRun", "zero_shot"]

CLIP_BATCH = 64
# Images -> the line of each, in their order.
Classify = Callable[[ImageDataset], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class ZeroShotRun(Reported):
    """A zero-shot run; its report: accuracy with interval, seconds an image, and how it was measured.

    Attributes:
        rows: one an image, in the order of the data set.
    """

    rows: list[dict[str, Any]]


@mendable()
def zero_shot(config: ZeroShotConfig, progress: Report = silent) -> ZeroShotRun:
    """Classify labelled images by the names of their classes, in a run directory.

    Args:
        config: which images, by what, and where to.
        progress: told after each image.

    Returns:
        The run; ``report`` is also in ``report.json``, the rows in ``metrics.jsonl``.

    Raises:
        KeyError: an unknown backbone.
        ValueError: images without labels, a model that can't be asked, a setting that can't be, or a run that
            is there already.
        ImageError: an image can't be read and is not to be skipped; the lines before it stay.
    """
    check_fields(config)
    dataset, skipped = open_images(config.data)
    if dataset.labels is None or len(dataset.classes) < 2:
        raise ValueError(
            f"{printable(dataset.name)} has no labels, or one class alone: zero-shot needs the names of two "
            "classes or more (class folders, or a labelled set)"
        )
    if config.method == "diffusion" and len(config.templates) > 1:
        raise ValueError(
            f"{plural(len(config.templates), 'template')}: the Diffusion Classifier takes one"
        )
    load = cache(lambda: (_clip if config.method == "clip" else _diffusion)(config, dataset))
    if begins(config):
        load()
    run = open_run(config, "zero-shot", ("report.json", "metrics.jsonl"))
    try:
        return _finished(run, config, dataset, skipped, load, progress)
    finally:
        run.close()


def _finished(
    run: Run,
    config: ZeroShotConfig,
    dataset: ImageDataset,
    skipped: list[str],
    load: Callable[[], Classify],
    progress: Report,
) -> ZeroShotRun:
    run.add_input("set of images", {"sha256": dataset.contents(), "classes": list(dataset.classes)})
    rows = _rows_by_id(run)
    unknown = set(rows) - set(dataset.ids)
    if unknown:
        raise ValueError(
            f"{run.path} has lines of other images, such as {printable(min(unknown))}: give the images that "
            "it was started with, or another folder"
        )
    if not (run.finished and len(rows) == len(dataset)):
        count = counted(progress, "zero-shot", len(dataset), "image")
        count(len(rows))
        left = dataset.subset([i for i, name in enumerate(dataset.ids) if name not in rows])
        for row in load()(left) if len(left) else ():
            rows[row["id"]] = row
            run.log(**row)
            count(1)
        report = _report(config, dataset, rows) | {"skipped": skipped}
        write_json(run.path / "report.json", report)
        run.finish()
    report = read_object(run.path / "report.json")
    return ZeroShotRun(run.path, report, [rows[name] for name in dataset.ids])


def _rows_by_id(run: Run) -> dict[str, dict[str, Any]]:
    if not run.metrics_path.exists():
        return {}
    rows = read_json_lines(run.metrics_path, torn=True)
    for row in rows:
        kinds = {"id": str, "predicted": int, "label": int, "seconds": float}
        if any(type(row.get(key)) is not kind for key, kind in kinds.items()):
            raise ValueError(
                f"{run.metrics_path} has a line that is no classified image's: start another run"
            )
    return {row["id"]: row for row in rows}


def _diffusion(config: ZeroShotConfig, dataset: ImageDataset) -> Classify:
    backbone = load_backbone(config.backbone)
    if schedule_of(backbone) is None:
        raise ValueError(
            f"{backbone.name} is no diffusion model: choose one for the Diffusion Classifier, or method clip"
        )
    template = config.templates[0] if config.templates else None
    prompts = class_texts(dataset, template)
    model = cast(DiffusionModel, backbone)

    def classify(images: ImageDataset) -> Iterator[dict[str, Any]]:
        rows = diffusion_classifier(model, images, prompts, config.classifier)
        for label, row in zip(images.labels or (), rows, strict=True):
            yield asdict(row) | {"label": int(label)}

    return classify


def _clip(config: ZeroShotConfig, dataset: ImageDataset) -> Classify:
    texts = [class_texts(dataset, template) for template in config.templates or (None,)]
    classifier = ZeroShot(config.clip, list(zip(*texts, strict=True)), config.device)

    def classify(images: ImageDataset) -> Iterator[dict[str, Any]]:
        labels = images.labels or ()
        begun = perf_counter()
        for indices, found in classifier.classify_all(images, CLIP_BATCH):
            seconds = (perf_counter() - begun) / len(indices)
            for index, predicted in zip(indices, found, strict=True):
                yield {
                    "id": images.ids[index],
                    "predicted": predicted,
                    "label": int(labels[index]),
                    "seconds": seconds,
                }
            begun = perf_counter()

    return classify


def _report(
    config: ZeroShotConfig, dataset: ImageDataset, rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    everything = [rows[name] for name in dataset.ids]
    found = score(
        [row["predicted"] for row in everything],
        [row["label"] for row in everything],
        sum(row["seconds"] for row in everything),
    )
    return {
        "method": config.method,
        "model": config.clip if config.method == "clip" else config.backbone.name,
        **asdict(found),
        "chance": 1 / len(dataset.classes),
        "classes": list(dataset.classes),
        "dataset": dataset.name,
        "split": dataset.split,
        "versions": versions(),
    }
