"""One entrance to every source of images: known data sets, folders, parquet files, Hugging Face data sets."""

import warnings
from collections import defaultdict
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from revelio.bounds import check_fields
from revelio.data.config import DataConfig
from revelio.data.dataset import ImageDataset
from revelio.data.picture import ARCHIVES, suffixes
from revelio.data.registry import dataset_names, get_spec, is_registered
from revelio.data.sources.folder import levels, open_folder
from revelio.data.sources.huggingface import (
    Columns,
    hub_splits,
    is_dataset_id,
    is_saved_dataset,
    open_splits,
    saved_splits,
)
from revelio.data.sources.idx import has_idx, open_idx
from revelio.data.sources.listing import find_pictures, is_picture, listed_dataset
from revelio.data.sources.parquet import parquet_files, parquet_splits
from revelio.data.spec import DatasetSpec
from revelio.trust import printable

SAMPLES = "samples"


def open_dataset(source: DataConfig | str | Path = SAMPLES, **settings: Any) -> ImageDataset:
    """Open a data set of images.

    A known name wins over a folder of the same name: write ``./name``, or a :class:`Path`, for that.

    Args:
        source: all settings in one, or the first of them.
        settings: fields of :class:`revelio.data.config.DataConfig`, which see.

    Raises:
        ValueError: the source is not there, empty or unreadable, or doesn't hold what was asked for.
        TypeError: a setting is unknown.
    """
    if not isinstance(source, DataConfig):
        local = isinstance(source, Path) and not source.is_absolute()
        source = DataConfig(source=f"./{source}" if local else str(source))
    config = replace(source, **settings)
    # Of a copy that is not there, it is said below what it may be.
    check_fields(replace(config, root=None))
    check_there(config)
    if is_registered(config.source):
        _check_no_table(config)
        dataset = _open_registered(get_spec(config.source), config)
    else:
        dataset = _open_other(config)
    return _narrow(dataset, config)


def is_local(config: DataConfig) -> bool:
    """Whether the pictures are in files given by the user: nothing is downloaded to open them."""
    return config.root is not None or (
        not is_registered(config.source) and Path(config.source).exists()
    )


def check_there(config: DataConfig) -> None:
    """See that there may be such images, from their path or name alone.

    Raises:
        ValueError: a folder or file is not there, or the name is no data set's.
    """
    path, known = Path(config.source), ", ".join(dataset_names())
    if is_registered(config.source):
        spec = get_spec(config.source)
        if config.root is not None and not Path(config.root).exists():
            raise ValueError(
                f"no copy of {spec.name} at {printable(config.root)}: it may be {spec.expects}"
            )
        if config.root is None and spec.hub is None and spec.name != SAMPLES:
            raise ValueError(f"{spec.name} is not on the hub: give a local copy as root")
    elif config.root is not None:
        raise ValueError(
            f"root is a local copy of a known data set, and {printable(config.source)} is none: choose from "
            f"{known}, or give the path as the source"
        )
    elif not path.exists() and not is_dataset_id(config.source):
        raise ValueError(
            f"{_missing(config)}, and no data set of this name: known ones are {known}"
        )


def _missing(config: DataConfig) -> str:
    return f"no folder or file at {printable(config.source)}"


def _open_other(config: DataConfig) -> ImageDataset:
    """Images that no name is known for: by their path, or from the hub."""
    labels = ("label",) if config.label_column is None else (config.label_column,)
    columns = Columns((config.image_column,), labels, config.label_column is not None)
    path = Path(config.source)
    if path.exists():
        return _open_path(path, config, path.resolve().stem, columns)
    _check_no_table(config)
    try:
        splits = hub_splits(config.source, config.revision)
    except ValueError as error:
        raise ValueError(f"{_missing(config)}, and {error}") from error
    return open_splits(splits, config.split, name=path.name, columns=columns, limits=config)


def _open_path(path: Path, config: DataConfig, name: str, columns: Columns) -> ImageDataset:
    folders = [path if path.is_dir() else path.parent]
    if path.is_dir() and is_saved_dataset(path):
        _check_alone(path, "a saved data set (state.json, ...)", may_name=True)
        splits = saved_splits(path)
    elif parquet := parquet_files(path):
        first = printable(parquet[0].relative_to(path)) if path.is_dir() else ""
        _check_alone(path, f"parquet files ({first}, ...)")
        splits = parquet_splits(parquet)
        folders = sorted({*folders, *(file.parent for file in parquet)}, reverse=True)
    elif path.is_file():
        raise ValueError(f"{printable(path)} is {_kind(path)}")
    else:
        return open_folder(
            path,
            split=config.split,
            name=path.resolve().name,
            label_column=config.label_column,
            labels=config.labels,
            limits=config,
        )
    _check_no_table(config)
    return open_splits(
        splits, config.split, name=name, columns=columns, folders=folders, limits=config
    )


def _check_no_table(config: DataConfig) -> None:
    """Refuse a table of labels of pictures that bring their own."""
    if config.labels is not None:
        raise ValueError(
            f"labels is a table of a folder's pictures, and {printable(config.source)} is no such folder: "
            "leave it out, and name a column by label_column"
        )


def _kind(path: Path) -> str:
    """What a file that is no source of images is, and what to do."""
    suffix = path.suffix.lower()
    if suffix in ARCHIVES:
        return "an archive: unpack it, and give the folder"
    if suffix in (".csv", ".tsv", ".json", ".jsonl", ".txt"):
        return (
            "a list: give the folder of its pictures; a table of their labels is given as labels, or is a "
            "metadata.csv there with the columns file_name and label"
        )
    if is_picture(str(path), suffixes()):
        return "a single picture: give the folder that holds it"
    return "no parquet file: give one, or a folder of images"


def _check_alone(path: Path, rows: str, *, may_name: bool = False) -> None:
    """Refuse a folder that holds both pictures and a data set of rows: either may be what is meant.

    Args:
        path: the folder; a file is alone.
        rows: what holds the rows, for messages.
        may_name: the rows may name pictures beside them, so that it is only said which are taken.
    """
    pictures = find_pictures(path) if path.is_dir() else []
    if not pictures:
        return
    both = f"{printable(path)} holds {rows} and pictures ({printable(pictures[0])}, ...)"
    if not may_name:
        raise ValueError(f"{both}: give the path of the one you mean, or move the other away")
    warnings.warn(f"{both}: only pictures that its rows hold or name are taken", stacklevel=3)


def _open_registered(spec: DatasetSpec, config: DataConfig) -> ImageDataset:
    own = spec.label_columns if config.label_column is None else (config.label_column,)
    columns = Columns((config.image_column, *spec.image_columns), own, required=True)
    root = None if config.root is None else Path(config.root)
    if root is None and spec.name == SAMPLES:
        root = Path(str(files("revelio"))) / "samples" / "fashion-mnist.parquet"
    if root is not None:
        return _named(_open_copy(spec, root, config, columns), spec)
    assert spec.hub is not None  # refused before
    splits = hub_splits(spec.hub, config.revision)
    found = open_splits(splits, config.split, name=spec.name, columns=columns, limits=config)
    return _named(found, spec)


def _open_copy(spec: DatasetSpec, root: Path, config: DataConfig, columns: Columns) -> ImageDataset:
    for place in levels(root) if root.is_dir() else ():
        if has_idx(place) and spec.classes:
            return open_idx(place, split=config.split, name=spec.name, classes=spec.classes)
        for layout in spec.layouts:
            if listing := layout(place, spec):
                return listed_dataset(listing, config.split, spec.name, config)
    dataset = _open_path(root, config, spec.name, columns)
    if dataset.labels is None:
        raise ValueError(
            f"{printable(root)} holds images without classes: it may be {spec.expects}"
        )
    return dataset


def _named(dataset: ImageDataset, spec: DatasetSpec) -> ImageDataset:
    """Under the known name, with its class names where the copy holds only their numbers."""
    known, dataset = spec.classes, replace(dataset, name=spec.name)
    bare = all(name.isdecimal() for name in dataset.classes)
    if not known or not bare or dataset.labels is None or dataset.classes == known:
        return dataset
    numbers = [int(name) for name in dataset.classes]
    # A class may be missing, so only the ends tell whether they are counted from 0 or from 1.
    first = 0 if min(numbers) == 0 else 1
    if max(numbers) >= len(known) + first or (first and max(numbers) < len(known)):
        warnings.warn(
            f"{spec.name}: the copy's classes are numbers ({min(numbers)} to {max(numbers)}), and no 0 or "
            f"{len(known)} tells whether they are counted from 0 or from 1: they keep their numbers as names",
            stacklevel=4,
        )
        return dataset
    used = sorted(set(numbers))
    places = {number: place for place, number in enumerate(used)}
    return replace(
        dataset,
        classes=tuple(known[number - first] for number in used),
        labels=[places[numbers[label]] for label in dataset.labels],
    )


def _narrow(dataset: ImageDataset, config: DataConfig) -> ImageDataset:
    if len(dataset.classes) == 1 and dataset.labels is not None:
        warnings.warn(
            f"{printable(dataset.name)}: all images are of one class ({printable(dataset.classes[0])}), so "
            "labels tell nothing apart; is there a folder too many, or too few?",
            stacklevel=3,
        )
    spelt = defaultdict[str, list[str]](list)
    for name in dataset.classes:
        spelt["".join(name.casefold().split())].append(name)
    if alike := next((names for names in spelt.values() if len(names) > 1), None):
        warnings.warn(
            f"{printable(dataset.name)}: the classes {printable(' and '.join(map(repr, alike)))} differ only "
            "in case or spaces: if they are one, give them one name",
            stacklevel=3,
        )
    if config.per_class is not None:
        if dataset.labels is None:
            raise ValueError(f"per_class needs labels and {dataset.name} has none: use limit")
        by_class: defaultdict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(dataset.labels):
            by_class[label].append(index)
        kept = sorted(index for some in by_class.values() for index in some[: config.per_class])
        dataset = dataset.subset(kept)
    return dataset if config.limit is None else dataset.spread(config.limit)
