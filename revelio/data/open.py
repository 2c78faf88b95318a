"""One entrance to every source of images: recipes, folders, parquet files, Hugging Face data sets."""

import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from revelio.data.dataset import ImageDataset
from revelio.data.folder import open_folder
from revelio.data.huggingface import (
    hub_splits,
    is_saved_dataset,
    open_splits,
    parquet_files,
    parquet_splits,
    saved_splits,
)
from revelio.data.idx import has_idx, open_idx
from revelio.data.listing import find_pictures, listed_dataset
from revelio.data.registry import Recipe, get_recipe, is_recipe, recipe_names
from revelio.trust import printable

SAMPLES = "samples"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_dataset(
    source: str | Path,
    *,
    split: str | None = None,
    root: str | Path | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    limit: int | None = None,
    per_class: int | None = None,
) -> ImageDataset:
    """Open a data set of images.

    Args:
        source: a recipe's name (which wins over a folder of the same name: write ``./name`` for
            that), a folder of images, a parquet file or folder of them, a folder written by
            ``save_to_disk``, or the id of a data set on the Hugging Face hub.
        split: which split; none: ``train`` where there are splits; ``all`` for every one.
        root: a local copy of a recipe's data.
        revision: of a hub id (a branch, tag or commit); None: the newest.
        image_column: where a Hugging Face data set holds the pictures.
        label_column: where it holds class names or ids; none: the recipe's, or ``label``.
        limit: only this many images, spread evenly over the set (after ``per_class``).
        per_class: only the first so many images of each class.

    Raises:
        ValueError: the source is not there, empty or unreadable, or doesn't hold what was asked for.
    """
    columns = ((image_column,), (label_column,) if label_column else ("label",))
    if isinstance(source, str) and is_recipe(source):
        recipe = get_recipe(source)
        columns = (
            (image_column, *recipe.image_columns),
            columns[1] if label_column else recipe.label_columns,
        )
        place = None if root is None else Path(root)
        dataset = _open_recipe(recipe, place, revision, split, *columns)
        dataset = _named(dataset, recipe)
    elif root is not None:
        raise ValueError(
            f"--data.root is a local copy of a recipe's data, and {source} is no recipe: choose from "
            f"{', '.join(recipe_names())}, or give the path as the source"
        )
    elif Path(source).exists():
        path = Path(source)
        dataset = _open_path(path, split, path.resolve().stem, *columns, label_column is not None)
    else:
        dataset = _open_hub(str(source), revision, split, *columns, label_column is not None)
    return _narrow(dataset, limit, per_class)


def _open_path(
    path: Path,
    split: str | None,
    name: str,
    images: Sequence[str],
    labels: Sequence[str],
    label_required: bool,
) -> ImageDataset:
    if path.is_dir() and is_saved_dataset(path):
        _check_alone(path, "a saved data set (state.json, ...)", may_name=True)
        splits = saved_splits(path)
    elif parquet := parquet_files(path):
        first = printable(parquet[0].relative_to(path)) if path.is_dir() else ""
        _check_alone(path, f"parquet files ({first}, ...)")
        splits = parquet_splits(parquet)
    elif path.is_file():
        raise ValueError(f"{path} is no parquet file: give one, or a folder of images")
    else:
        return open_folder(path, split=split, name=path.resolve().name)
    return open_splits(
        splits,
        split,
        name=name,
        image_columns=images,
        label_columns=labels,
        label_required=label_required,
        folder=path if path.is_dir() else path.parent,
    )


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


def _open_hub(
    hub_id: str,
    revision: str | None,
    split: str | None,
    images: Sequence[str],
    labels: Sequence[str],
    required: bool,
) -> ImageDataset:
    known = f"known recipes are {', '.join(recipe_names())}"
    # A single word could be an old-style hub id; it is far more often a misspelt recipe.
    if not _HUB_ID.fullmatch(hub_id) or "/" not in hub_id or hub_id.startswith("."):
        raise ValueError(f"no folder or file at {hub_id}, and no recipe of this name: {known}")
    try:
        splits = hub_splits(hub_id, revision)
    except ValueError as error:
        raise ValueError(f"no folder or file at {hub_id}, and {error}") from error
    return open_splits(
        splits,
        split,
        name=hub_id.rpartition("/")[2],
        image_columns=images,
        label_columns=labels,
        label_required=required,
    )


def _open_recipe(
    recipe: Recipe,
    root: Path | None,
    revision: str | None,
    split: str | None,
    images: Sequence[str],
    labels: Sequence[str],
) -> ImageDataset:
    if root is None and recipe.name == SAMPLES:
        root = Path(str(files("revelio"))) / "samples" / "fashion-mnist.parquet"
    if root is None:
        if recipe.hub is None:
            raise ValueError(f"{recipe.name} is not on the hub: give a local copy with --data.root")
        splits = hub_splits(recipe.hub, revision)
        return open_splits(
            splits,
            split,
            name=recipe.name,
            image_columns=images,
            label_columns=labels,
            label_required=True,
        )
    if not root.exists():
        raise ValueError(f"no copy of {recipe.name} at {root}: it may be {recipe.expects}")
    if root.is_dir():
        if has_idx(root) and recipe.classes:
            return open_idx(root, split=split, name=recipe.name, classes=recipe.classes)
        for layout in recipe.layouts:
            if listing := layout(root, recipe):
                return listed_dataset(listing, split, recipe.name)
    dataset = _open_path(root, split, recipe.name, images, labels, True)
    if dataset.labels is None:
        raise ValueError(f"{root} holds images without classes: it may be {recipe.expects}")
    return dataset


def _named(dataset: ImageDataset, recipe: Recipe) -> ImageDataset:
    """Under the recipe's name, with its class names where the copy holds only numbers."""
    known = recipe.classes
    bare = all(name.isdecimal() and int(name) < len(known) for name in dataset.classes)
    if known and bare and dataset.labels is not None:
        # Some of the numbers may not occur at all: each keeps its own name.
        labels = [int(dataset.classes[label]) for label in dataset.labels]
        return replace(dataset, name=recipe.name, classes=known, labels=labels)
    return replace(dataset, name=recipe.name)


def _narrow(dataset: ImageDataset, limit: int | None, per_class: int | None) -> ImageDataset:
    for flag, value in (("limit", limit), ("per-class", per_class)):
        if value is not None and value < 1:
            raise ValueError(f"--data.{flag} is {value}: give 1 or more")
    if per_class is not None:
        if dataset.labels is None:
            raise ValueError(
                f"--data.per-class needs labels and {dataset.name} has none: use --data.limit"
            )
        by_class: defaultdict[int, list[int]] = defaultdict(list)
        for index, label in enumerate(dataset.labels):
            by_class[label].append(index)
        kept = sorted(index for members in by_class.values() for index in members[:per_class])
        dataset = dataset.subset(kept)
    return dataset if limit is None else dataset.spread(limit)
