"""Images or stored grids -> Diff-C, trained and tested over several seeds in a run folder.

from revelio.pipelines.train_diffc import TrainDiffCConfig, train_diffc

made = train_diffc(TrainDiffCConfig(out=Path("runs/diffc"), layer="up_ft1", width=64, epochs=15))
made.report["top1"], made.model()

seeds/seed-0.json  one finished training: history, last and best epoch's measures, confusion
final/             the first seed's classifier, the epoch that was selected
report.json        all seeds together        confusion.png    the first seed's

Under ``torchrun`` every process takes its share of each batch (:mod:`revelio.diffc.shared`) and of the views
that are kept, in files then; the first one writes and reports.
"""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from revelio.bounds import check_fields
from revelio.data.config import DataConfig
from revelio.data.dataset import ImageDataset
from revelio.data.loading import mendable
from revelio.data.splits import NoSplits
from revelio.device_memory import release
from revelio.diffc.cache import drop_cache
from revelio.diffc.config import TestConfig, TrainDiffCConfig
from revelio.diffc.cost import training_seconds
from revelio.diffc.fit import SeedRun, Task, finish_seed, start_seed, summarise
from revelio.diffc.fitting import too_large
from revelio.diffc.inputs import (
    check_classes,
    check_made,
    cut_test,
    live_grids,
    open_backbone,
    open_images,
    open_stores,
    portable,
)
from revelio.diffc.measures import confusion_png
from revelio.diffc.model import DiffC, head_macs, load_diffc
from revelio.diffc.shared import Share
from revelio.diffc.train import load_training, save_training
from revelio.diffc.trained_on import trained_on
from revelio.distributed import Processes, launched, world_size
from revelio.files import check_folder
from revelio.hub import FINAL
from revelio.machine import duration
from revelio.pipelines import Progress, Report, Reported, silent
from revelio.pipelines.diffc_views import keep_views
from revelio.pipelines.inputs import hashed, open_run
from revelio.run_dir import Run, write_folder, write_json, write_whole
from revelio.trust import printable, read_object
from revelio.wording import plural

__all__ = ["TrainDiffCConfig", "TrainedDiffC", "train_diffc"]

WEIGHTS = (f"{FINAL}/config.json", f"{FINAL}/model.safetensors")
# What a finished run has.
RESULTS = ("report.json", "confusion.png", *WEIGHTS)


@dataclass(frozen=True)
class TrainedDiffC(Reported):
    """A finished run; its report: top-1 with its interval, each seed's measures, settings, ..."""

    def model(self) -> DiffC:
        """The first seed's classifier, read from the folder."""
        return load_diffc(self.path)


@mendable()
def train_diffc(config: TrainDiffCConfig, progress: Report = silent) -> TrainedDiffC:
    """Train and test Diff-C with every seed; the test images are seen once, at the end of each training.

    Args:
        config: what to train, on what, and where to.
        progress: told what is opened and what it costs, then every step.

    Returns:
        The run, also where it was finished before (with ``config.resume``).

    Raises:
        ValueError: a value is outside its bounds, the run folder is taken, or the images or stores don't fit
            together, or it was started on other pictures.
        KeyError: an unknown backbone or layer.
    """
    check_fields(config)
    processes = Processes() if world_size() == 1 else launched(config.device)
    heard = progress is not silent
    made = _train(config, processes, progress if processes.main else silent, heard)
    processes.close()
    return made


def _train(
    config: TrainDiffCConfig, processes: Processes, progress: Report, heard: bool
) -> TrainedDiffC:
    """Train, test and sum up, as one of the processes.

    Args:
        config: what to train.
        processes: this one, and how many there are.
        progress: the main process's.
        heard: whether anybody listens to this one: the time is measured then, in all such processes at once,
            as one alone would have the cores of the others.
    """
    done = config.resume and all((config.out / name).is_file() for name in RESULTS)
    processes.wait()  # all have looked before one writes
    if done:
        return _finish_again(config, processes, progress)
    check_folder(config.out)
    started, asked = time.monotonic(), config
    config = _placed(config, processes)
    live = _open_stored(config) if config.store else _open_images(config, progress)
    run = open_run(asked, "train-diffc", RESULTS, processes)
    opened = time.monotonic()
    task = keep_views(live, config, processes, progress)
    viewed = time.monotonic()
    if processes.main:
        contents = {"train": task.source.contents, "test": task.test.contents}
        run.add_input("set of pictures", contents)
    _announce(task, config, progress, _seconds(task, config, processes, heard))
    every = range(config.seeds)
    results = [_train_seed(run, live, task, config, n, processes, progress) for n in every]
    seconds = {
        "opening": round(opened - started, 2),
        "views": round(viewed - opened, 2),
        "training": round(time.monotonic() - viewed, 2),
    }
    report = {"grids": task.made, "skipped": task.skipped, "seconds": seconds}
    report |= summarise(results, task, config)
    if not processes.main:
        processes.wait()
        return TrainedDiffC(config.out, report)
    counts = torch.tensor(results[0]["confusion"])
    write_whole(run.path / "confusion.png", confusion_png(counts, task.classes))
    write_json(run.path / "report.json", report)
    _finish(run, config, report)
    processes.wait()
    progress(Progress(_summary(config.out, report)))
    return TrainedDiffC(config.out, report)


def _placed(config: TrainDiffCConfig, processes: Processes) -> TrainDiffCConfig:
    """The config with this process's own device, which is no part of what a run is known by."""
    if processes.world == 1:
        return config
    own = {
        name: processes.device if asked in ("auto", "cuda") else asked
        for name, asked in (("fit", config.device), ("backbone", config.backbone.device))
    }
    backbone = replace(config.backbone, device=own["backbone"])
    return replace(config, device=own["fit"], backbone=backbone)


def _finish_again(config: TrainDiffCConfig, processes: Processes, progress: Report) -> TrainedDiffC:
    """Finish a run whose results are all there: it was stopped at the very end, or not at all."""
    run = open_run(config, "train-diffc", RESULTS, processes)
    report = read_object(config.out / "report.json")
    if processes.main:
        _finish(run, config, report)
    processes.wait()
    progress(Progress(f"this run is finished: see {config.out / 'report.json'}"))
    return TrainedDiffC(config.out, report)


def _finish(run: Run, config: TrainDiffCConfig, report: dict[str, Any]) -> None:
    """Mark a run whose report is written as finished, then drop checkpoints and kept views."""
    if not run.finished:
        run.finish(top1=report["top1"])
    run.drop_checkpoints(keep=0)
    if config.cache_dir is None:
        drop_cache(config.out / "cache")


def _open_images(config: TrainDiffCConfig, progress: Report) -> Task:
    """Grids that a backbone makes of two data sets.

    Raises:
        ValueError: no test split, no labels, different classes.
        KeyError: an unknown backbone or layer.
    """
    train, tested, skipped = _train_and_test(config, progress)
    classes = check_classes(train, tested)
    backbone = open_backbone(config, imports=True)
    train, tested = hashed(train, progress), hashed(tested, progress)
    source, test = (live_grids(each, backbone, config, config.workers) for each in (train, tested))
    made = config.made() | {"dataset": train.name, "split": train.split}
    made |= {"backbone": portable(made["backbone"]), "clip": portable(made["clip"])}
    return Task(source, test, classes, made, skipped)


def _train_and_test(
    config: TrainDiffCConfig, progress: Report
) -> tuple[ImageDataset, ImageDataset, list[str]]:
    data, test = config.data, config.test
    train, skipped = open_images(data)
    if test.split is None:
        return *cut_test(train, test.fraction, config.seed), skipped
    try:
        tested, more = open_images(_test_data(data, test))
    except NoSplits as error:
        if test.split != TestConfig.split:
            raise ValueError(f"{error} (the test set; test.split None cuts some off)") from error
        kept, held = cut_test(train, test.fraction, config.seed)
        said = (
            f"{printable(train.name)} has no splits: {len(held):,} of {plural(len(train), 'image')} "
            f"({test.fraction:.0%} of every class) are held out as the test set"
        )
        progress(Progress(said))
        return kept, held, skipped
    except ValueError as error:
        remedy = f"test.split None cuts {test.fraction:.0%} off as a test set"
        raise ValueError(f"{error} (the test set; {remedy})") from error
    return train, tested, skipped + more


def _test_data(data: DataConfig, test: TestConfig) -> DataConfig:
    own = asdict(test)
    del own["fraction"]
    return replace(data, **own)


def _open_stored(config: TrainDiffCConfig) -> Task:
    """Grids out of activation stores.

    Raises:
        ValueError: a store is missing or broken, or train and test were made differently.
    """
    if config.test_store is None:
        raise ValueError("stores need test_store, the grids of the test images")
    source, made = open_stores(config.store, config.cache_gb)
    test, other = open_stores([config.test_store], config.cache_gb)
    check_made(made, other)
    return Task(source, test, tuple(made.pop("classes")), made)


def _seconds(
    task: Task, config: TrainDiffCConfig, processes: Processes, heard: bool
) -> float | None:
    """How long the trainings will take; None where a batch does not fit, of which the first step tells.

    All processes wait for each other, also those that nobody listens to and that measure nothing.
    """
    processes.wait()
    try:
        return (
            training_seconds(task, config, Share(processes.rank, processes.world))
            if heard
            else None
        )
    except torch.OutOfMemoryError as error:
        release(error)
        return None
    finally:
        processes.wait()


def _announce(
    task: Task, config: TrainDiffCConfig, progress: Report, seconds: float | None
) -> None:
    """What is frozen, what trains, how many parameters, how much work, and how long it takes."""
    source, made = task.source, task.made
    model = DiffC(**config.sizes(source.shape[0], len(task.classes)))
    images = len(task.split(config, config.seed)[0])
    macs = head_macs(source.shape, config.width)
    work = 3 * 2 * macs * images * config.epochs * config.seeds
    takes = "" if seconds is None else f", {duration(seconds)} with the tests (measured)"
    views = "views kept" if source.views is not None else "on-line: a backbone pass each time"
    progress(
        Progress(
            f"frozen: {printable(made.get('backbone'))} at {printable(made.get('layer'))}, "
            f"timestep {made.get('timestep')}; "
            f"trained: Diff-C, {plural(model.parameter_count(), 'parameter')}\n"
            f"training: {plural(images, 'image')} x {plural(config.epochs, 'epoch')} x "
            f"{plural(config.seeds, 'seed')}, {macs / 1e9:.3g} GMAC an image forward, {work / 1e12:.3g} "
            f"TFLOP in all{takes}; {views}"
        )
    )


def _train_seed(
    run: Run,
    live: Task,
    task: Task,
    config: TrainDiffCConfig,
    number: int,
    processes: Processes,
    progress: Report,
) -> dict[str, Any]:
    """Train and test one seed, unless that is done; what was measured.

    Raises:
        ValueError: a checkpoint is broken, or a batch does not fit the device's memory: the message names
            one that does.
    """
    processes.wait()  # what the main one wrote of the seed before is there
    seed = config.seed + number
    path = run.path / "seeds" / f"seed-{seed}.json"
    left = all((run.path / name).is_file() for name in WEIGHTS)
    if path.is_file() and (number > 0 or left):
        return read_object(path)
    one = start_seed(task, config, seed, Share(processes.rank, processes.world))
    before = number * config.epochs
    _go_on(run, one, before, processes)
    try:
        _follow(run, one, task, before, processes, progress)
    except torch.OutOfMemoryError as error:
        raise too_large(one.training, task.source, config.batch_size, error) from error
    result = finish_seed(one, task)
    if not processes.main:
        return result
    if number == 0:
        write_folder(run.path / FINAL, partial(_save_final, one, live, result))
    write_json(path, result)
    return result


def _follow(
    run: Run, one: SeedRun, task: Task, before: int, processes: Processes, progress: Report
) -> None:
    """Train to the end; log, save and report each epoch."""
    images, epochs = len(one.train), one.config.epochs
    total, done = images * epochs, images * len(one.training.history)
    stage, numbers = f"training, seed {one.seed}", ()
    for state in one.steps(task.source):
        done += state.images
        if (end := state.end) is not None:
            step = before + end.epoch
            if processes.main:
                run.log(step=step, seed=one.seed, **asdict(end))
                run.save_checkpoint(step, partial(save_training, one.training), keep=1)
            numbers = (("epoch", str(end.epoch)), ("loss", f"{end.train_loss:.3f}"))
            if end.validation_top1 is not None:
                numbers += (("validation", f"{end.validation_top1:.1%}"),)
        progress(Progress("", done, total, "image", numbers, stage))


def _go_on(run: Run, one: SeedRun, before: int, processes: Processes) -> None:
    """Take up the seed's last whole epoch, if there is one."""
    found = run.latest_checkpoint()
    step = before
    if found is not None and found[0] > before:
        step, folder = found
        load_training(one.training, folder)
    processes.wait()  # all have read it before the main one writes the next
    if processes.main:
        run.truncate_metrics(step)


def _save_final(one: SeedRun, live: Task, result: dict[str, Any], folder: Path) -> None:
    own = ("top1", "wilson95", "class_mean", "images")
    tested = {
        which: {key: result[which]["test"][key] for key in own}
        for which in ("last", "best")
        if result[which]
    }
    card = {"training": one.config.plain() | {"images": len(one.train)}}
    card |= {f"{which} epoch, test images": found for which, found in tested.items()}
    one.training.model.save_pretrained(folder, model_card_kwargs=card)
    trained_on(live.source, live.made.get("dataset")).save(folder)


def _summary(out: Path, report: dict[str, Any]) -> str:
    low, high = report["interval"]
    lines = [
        f"top-1 on {plural(report['images']['test'], 'test image')}: {report['top1']:.2%} "
        f"[{low:.2%}, {high:.2%}] ({report['interval_kind']}), "
        f"{report['selected']} epoch, mode {report['mode']}"
    ]
    for which in ("last", "best"):
        if found := report[which]:
            lines.append(f"  {which} epoch: {found['mean']:.2%} (mean of {found['seeds']})")
    lines.append(f"  largest class: {report['majority_share']:.2%} of the test images")
    if report["skipped"]:
        lines.append(
            f"  {plural(len(report['skipped']), 'unreadable image')} left out (named in report.json)"
        )
    lines.append(
        f"written: {out / 'report.json'}, {out / 'confusion.png'}, {out / FINAL} (classifier)"
    )
    return "\n".join(lines)
