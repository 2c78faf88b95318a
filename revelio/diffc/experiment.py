"""Diff-C trainings in a run directory: checkpoints after each epoch, results by seed, one report.

seeds/seed-0.json  one finished training: history, last and best epoch's measures, confusion
final/             the first seed's classifier, the epoch that was selected
report.json        all seeds together        confusion.png    the first seed's
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from revelio.diffc.fit import FitSettings, SeedRun, check_pair, finish_seed, start_seed, summarise
from revelio.diffc.model import STRIDES
from revelio.diffc.picture import confusion_png
from revelio.diffc.sources import GridSource
from revelio.diffc.state import load_training, save_training
from revelio.diffc.train import StepState
from revelio.diffc.trained_on import TrainedOn
from revelio.run_dir import Run, read_json, write_folder, write_json, write_whole

FINAL = "final"


def train_seeds(
    run: Run,
    source: GridSource,
    test: GridSource,
    settings: FitSettings,
    trained: Callable[[], TrainedOn] | None = None,
) -> Iterator[tuple[int, StepState]]:
    """Train and test every seed that isn't done yet; yields (seed, state) after every batch.

    Args:
        run: the run directory.
        source: grids of the training and validation images.
        test: grids of the test images.
        settings: what is trained how.
        trained: says which images these are, to be kept with the classifier.

    Raises:
        ValueError: train, test and classes don't fit together, a checkpoint is broken, or the run was
            started on other pictures.
    """
    check_pair(source, test, len(settings.classes))
    run.add_input("set of pictures", {"train": source.contents, "test": test.contents})
    for number, seed in enumerate(settings.seed_list()):
        if _is_done(run, number, seed):
            continue
        before = number * settings.train.epochs
        one = start_seed(source, settings, seed)
        _go_on(run, one, before)
        for state in one.steps(source):
            if state.end is not None:
                step = before + state.end.epoch
                run.log(step=step, seed=seed, **asdict(state.end))
                run.save_checkpoint(step, partial(save_training, one.training), keep=1)
            yield seed, state
        result = finish_seed(one, test, settings)
        if number == 0:
            write_folder(run.path / FINAL, partial(_save_final, one, trained))
        write_json(_result(run, seed), result)


def _save_final(one: SeedRun, trained: Callable[[], TrainedOn] | None, folder: Path) -> None:
    one.training.model.save_pretrained(folder)
    if trained is not None:
        trained().save(folder)


def _go_on(run: Run, one: SeedRun, before: int) -> None:
    """Take up the seed's last whole epoch, if there is one."""
    found = run.latest_checkpoint()
    step = before
    if found is not None and found[0] > before:
        step, folder = found
        load_training(one.training, folder)
    run.truncate_metrics(step)


def epochs_done(run: Run, settings: FitSettings) -> int:
    """How many epochs, over all seeds, a run that is taken up again has behind it."""
    whole = sum(_is_done(run, *numbered) for numbered in enumerate(settings.seed_list()))
    found = run.latest_checkpoint()
    return max(whole * settings.train.epochs, found[0] if found else 0)


def write_report(
    run: Run, source: GridSource, test: GridSource, settings: FitSettings, **entries: Any
) -> dict[str, Any]:
    """Sum up all seeds, write the confusion picture and ``report.json``, finish the run."""
    results = [read_json(_result(run, seed)) for seed in settings.seed_list()]
    report = entries | summarise(results, settings, source, test)
    counts = torch.tensor(results[0]["confusion"])
    write_whole(run.path / "confusion.png", confusion_png(counts, settings.classes))
    write_json(run.path / "report.json", report)
    finish(run, report)
    return report


def finish(run: Run, report: dict[str, Any]) -> None:
    """Mark a run whose report is written as finished, then drop its checkpoints."""
    run.finish(top1=report["top1"])
    run.drop_checkpoints(keep=0)


def head_macs(shape: tuple[int, int, int], width: int) -> int:
    """Multiply-adds of one image's way through Diff-C (without the last, small linear layer)."""
    channels, height, side = shape
    total, before = 0, channels
    for stride in STRIDES:
        height, side = -(-height // stride), -(-side // stride)
        total += 9 * before * width * height * side
        before = width
    return total


def _is_done(run: Run, number: int, seed: int) -> bool:
    """Whether a seed's result is written, and the classifier that the first one leaves."""
    final = run.path / FINAL
    left = all((final / name).is_file() for name in ("config.json", "model.safetensors"))
    return _result(run, seed).is_file() and (number > 0 or left)


def _result(run: Run, seed: int) -> Path:
    return run.path / "seeds" / f"seed-{seed}.json"
