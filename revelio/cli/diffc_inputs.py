"""What `train-diffc` and `eval-diffc` open before they start: data sets, backbone, stores, kept views."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revelio.bounds import Count, OpenShare
from revelio.cli.options import build_dataset, read_contents
from revelio.data.config import DataConfig
from revelio.machine import available_memory
from revelio.trust import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from revelio.data.dataset import ImageDataset
    from revelio.diffc.cache import CacheSettings
    from revelio.diffc.sources import GridSource


@dataclass(frozen=True)
class TestOptions:
    """The images that the classifier is tested on; all else is as in `data`."""

    __test__ = False  # no test class, whatever pytest thinks of its name

    split: str | None = "test"
    """The split; none, and where the images have no splits at all: a share of every class is cut off the
    training images instead."""

    fraction: OpenShare = 0.2
    """That share."""

    limit: Count | None = None
    """Take only this many, spread evenly."""

    per_class: Count | None = None
    """Take only the first so many of each class."""


@dataclass
class Inputs:
    """Grids of train and test.

    Attributes:
        source: of the training images, validation included.
        test: of the test images.
        classes: class names by class id.
        made: how the grids are made (see :mod:`revelio.diffc.inputs`).
        skipped: one line on each image that could not be read.
    """

    source: GridSource
    test: GridSource
    classes: tuple[str, ...]
    made: dict[str, Any]
    skipped: list[str]


def open_images(
    data: DataConfig, test: TestOptions, made: dict[str, Any], *, device: str, workers: int
) -> Inputs:
    """Grids that a backbone makes of two data sets.

    Raises:
        ValueError: no test split, no labels, different classes.
        KeyError: an unknown backbone or layer.
    """
    from revelio.diffc.inputs import check_classes, live_grids, open_backbone, portable

    train, tested, skipped = _train_and_test(data, test, made["seed"])
    classes = check_classes(train, tested)
    backbone = open_backbone(made, device, imports=True)
    made = made | {"dataset": train.name, "split": train.split}
    train, tested = read_contents(train), read_contents(tested)
    sources = [live_grids(each, backbone, made, device, workers) for each in (train, tested)]
    made |= {"backbone": portable(made["backbone"]), "clip": portable(made["clip"])}
    return Inputs(sources[0], sources[1], classes, made, skipped)


def _train_and_test(
    data: DataConfig, test: TestOptions, seed: int
) -> tuple[ImageDataset, ImageDataset, list[str]]:
    from revelio.data.splits import NoSplits
    from revelio.diffc.inputs import cut_test

    train, skipped = open_readable(data)
    if test.split is None:
        return *cut_test(train, test.fraction, seed), skipped
    other = replace(data, split=test.split, limit=test.limit, per_class=test.per_class)
    try:
        tested, more = open_readable(other)
    except NoSplits as error:
        if test.split != TestOptions.split:
            raise ValueError(f"{error} (the test set; --test.split None cuts some off)") from error
        kept, held = cut_test(train, test.fraction, seed)
        print(
            f"{printable(train.name)} has no splits: {len(held):,} of {len(train):,} images "
            f"({test.fraction:.0%} of every class) are held out as the test set"
        )
        return kept, held, skipped
    except ValueError as error:
        remedy = f"--test.split None cuts {test.fraction:.0%} off as a test set"
        raise ValueError(f"{error} (the test set; {remedy})") from error
    return train, tested, skipped + more


def open_readable(data: DataConfig) -> tuple[ImageDataset, list[str]]:
    """The data set; with `--data.on-error skip` without its unreadable images, which are named."""
    from revelio.diffc.inputs import readable

    dataset = build_dataset(data)
    return readable(dataset) if data.on_error == "skip" else (dataset, [])


def open_stored(stores: Sequence[Path], test_store: Path | None, memory_gb: float) -> Inputs:
    """Grids out of activation stores.

    Raises:
        ValueError: a store is missing or broken, or train and test were made differently.
    """
    from revelio.diffc.inputs import check_made, open_stores

    if test_store is None:
        raise ValueError("--stores needs --test-store, the grids of the test images")
    source, made = open_stores(stores, memory_gb)
    test, other = open_stores([test_store], memory_gb)
    check_made(made, other)
    classes = tuple(made.pop("classes"))
    return Inputs(source, test, classes, made, [])


def keep_views(inputs: Inputs, views: int, cache: CacheSettings) -> tuple[GridSource, GridSource]:
    """Compute ``views`` augmented views of train, and the plain one of test, once.

    Prints what that costs, from the speed of one pass.
    """
    from tqdm import tqdm

    from revelio.diffc.cache import fill_cache

    kept: list[GridSource] = []
    whole = [replace(cache, views=views), replace(cache, views=0)]
    for name, source, settings in zip(
        ("train", "test"), (inputs.source, inputs.test), whole, strict=True
    ):
        total = len(source.ids) * (1 + settings.views)
        print(f"{name} grids: {total:,} of {_cost(source, settings, total)}")
        with tqdm(total=total, desc=f"{name} grids", unit="image") as bar:
            for state in fill_cache(source, settings):
                bar.update(state.images)
                if state.grids is not None:
                    kept.append(state.grids)
    return kept[0], kept[1]


def _cost(source: GridSource, cache: CacheSettings, total: int) -> str:
    """Shape, size, place and time, the last from one pass; refuses what the disk can't hold."""
    from revelio.machine import size as printed

    size, shape = cache.gigabytes(source), "x".join(map(str, source.shape))
    where, memory = "in memory", available_memory()
    if memory is not None and memory / 1e9 < size <= cache.memory_gb:
        raise ValueError(
            f"the views need {printed(int(size * 1e9))} of memory, of which {printed(memory)} are available: "
            "take fewer --views, or a smaller --cache-gb, which keeps them in files"
        )
    if size > cache.memory_gb:
        where = f"in {cache.folder}"
        free = shutil.disk_usage(_existing(cache.folder)).free
        if size * 1e9 > free:
            raise ValueError(
                f"the views need {printed(int(size * 1e9))} in {cache.folder}, "
                f"where {printed(free)} are free: "
                "take fewer --views, another --cache-dir, or --views -1 (on-line)"
            )
    batch = range(min(cache.batch_size, len(source.ids)))
    started = time.monotonic()
    source.grids(batch, 0)
    seconds = total * (time.monotonic() - started) / len(batch)
    return f"{shape}, {size:.2f} GB {where}, {total / max(seconds, 1e-9):.3g} images/s, about " + (
        f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.absolute().parent)
