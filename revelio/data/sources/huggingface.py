"""Hugging Face data sets: a folder on disk, parquet files, or an id on the hub.

Pictures are read as the bytes they are stored as, so nothing is decoded before it is asked for. A parquet
file without features of its own works too: pictures are ``struct<bytes, path>`` or plain bytes. A column
``split`` in a set without splits makes splits.
"""

import os
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from revelio.data.config import Limits
from revelio.data.contents import UNREADABLE, digest_of
from revelio.data.dataset import ImageDataset, ImageError
from revelio.data.picture import LIMITS, read_picture
from revelio.data.sources.labels import class_ids, one_each
from revelio.data.sources.parquet import first_line
from revelio.data.splits import ALL, choose_split
from revelio.hub import is_hub_id
from revelio.trust import file_in, path_in, printable, read_object, regular_file

if TYPE_CHECKING:
    from datasets import Dataset

ID_COLUMNS = ("id", "image_id")
# Endings of files: such a name that is not there is a missing file, not a data set on the hub.
FILES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".zip", ".tar", ".gz")
# What a column of pictures may hold: files, or their paths.
STORED = ("binary", "large_binary", "string", "large_string")


@dataclass(frozen=True)
class Columns:
    """Which columns to read.

    Attributes:
        images: the first of these that is there holds the pictures.
        labels: the first of these that is there holds the labels.
        required: whether it is an error when none of ``labels`` is there.
    """

    images: Sequence[str] = ("image",)
    labels: Sequence[str] = ("label",)
    required: bool = False


@dataclass(frozen=True)
class RowReader:
    """Reads the picture of an index from a column of stored image files.

    Attributes:
        rows: what holds the column.
        column: its name.
        ids: one name a row.
        folders: a row may name a file instead of holding it: only files below one of these are read.
        limits: how large a picture may be.
    """

    rows: "Dataset"
    column: str
    ids: Sequence[str]
    folders: Sequence[Path]
    limits: Limits = LIMITS

    def __call__(self, index: int) -> Image.Image:
        """The picture at ``index``; raises :class:`revelio.data.dataset.ImageError`."""
        return read_picture(self._stored(index), self.ids[index], self.limits)

    def digest(self, index: int) -> str:
        """The hash of the stored bytes at ``index``."""
        try:
            return digest_of(self._stored(index))
        except ImageError:
            return UNREADABLE

    def _stored(self, index: int) -> bytes | Path:
        value = self.rows[index][self.column]
        if isinstance(value, Mapping):
            stored = value.get("bytes")
            value = value.get("path") if stored is None else stored
        if value is None:
            raise ImageError(self.ids[index], "the row holds no picture")
        return value if isinstance(value, bytes) else self._named(str(value), index)

    def _named(self, name: str, index: int) -> Path:
        """The file a row names: anybody may have written the row, so it must lie with the data set."""
        found: list[Path] = []
        # Windows writes paths with backslashes; elsewhere a name may hold one.
        for spelt in dict.fromkeys((name, name.replace("\\", "/"))):
            for folder in self.folders:
                with suppress(ValueError):
                    root, path = folder.resolve(), Path(spelt)
                    inside = path.relative_to(root) if path.is_absolute() else path
                    found.append(path_in(root, str(inside), what="a picture"))
        if found:
            return next(filter(os.path.exists, found), found[0])
        raise ImageError(
            self.ids[index],
            f"the row names the file {printable(name)}, which is not in the data set's own folder",
        )


def is_saved_dataset(path: Path) -> bool:
    """Whether ``path`` is a folder written by ``datasets``' ``save_to_disk``."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def saved_splits(path: Path) -> dict[str, "Dataset"]:
    """The splits of a folder written by ``save_to_disk``; the one key is "" where there are none.

    Raises:
        ValueError: the folder can't be read, or names files outside it.
    """
    import datasets

    _check_saved(path)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"{path} is no whole saved data set: {first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        return {str(split): rows for split, rows in loaded.items()}
    return {"": loaded}


def _check_saved(path: Path) -> None:
    """See that a saved data set names only files of its own; ``load_from_disk`` would read any.

    Raises:
        ValueError: its lists are broken, or name something outside it.
    """
    parts = [path]
    if (path / "dataset_dict.json").is_file():
        splits = read_object(path / "dataset_dict.json").get("splits")
        if not isinstance(splits, list):
            raise ValueError(f"{path} is no whole saved data set: it lists no splits")
        parts = [file_in(path, split, what="a split") for split in splits]
    for part in parts:
        files = read_object(part / "state.json").get("_data_files")
        if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
            raise ValueError(f"{part} is no whole saved data set: it lists no data files")
        for file in files:
            regular_file(file_in(part, file.get("filename"), what="a data file"))


def is_dataset_id(name: str) -> bool:
    """Whether a name can be that of a data set on the hub: `owner/name`, and no path's that is missing.

    A single word could be an old-style id; it is far more often a misspelt name.
    """
    return is_hub_id(name) and Path(name).suffix.lower() not in FILES


def hub_splits(hub_id: str, revision: str | None = None) -> dict[str, "Dataset"]:
    """Every split of a data set on the Hugging Face hub, downloaded once and cached by ``datasets``.

    Raises:
        ValueError: the hub, or the data set on it, can't be reached and isn't in the cache.
    """
    import datasets
    import huggingface_hub
    from datasets.config import HF_DATASETS_CACHE

    try:
        try:
            # One short question first: the download itself retries for half a minute, noisily.
            huggingface_hub.HfApi().dataset_info(hub_id, revision=revision, timeout=10)
        except Exception:
            if not (Path(HF_DATASETS_CACHE) / hub_id.replace("/", "___")).is_dir():
                raise
        loaded = datasets.load_dataset(hub_id, revision=revision)
    except Exception as error:
        raise ValueError(
            f"the data set {hub_id} can't be had from the Hugging Face hub ({first_line(error)}): "
            "check its name and the network, or give a local copy of a known data set as root"
        ) from error
    return {str(split): rows for split, rows in loaded.items()}  # type: ignore[union-attr]


def open_splits(
    splits: Mapping[str, "Dataset"],
    split: str | None,
    *,
    name: str,
    columns: Columns,
    folders: Sequence[Path] = (),
    limits: Limits = LIMITS,
) -> ImageDataset:
    """The rows of one split as images with ids and labels, in their own order.

    Ids are the column ``id`` or ``image_id`` where its values are unique, else ``<split>/<row>``.

    Args:
        splits: rows by split; the one key is "" where there are none.
        split: which; ``all`` for every one, one after the other.
        name: what results call the set.
        columns: which hold the pictures and the labels.
        folders: the data set's own, whose files rows may name; none: the caches of the hub's libraries.
        limits: how large a picture may be.

    Raises:
        ValueError: no such split or column, or labels that are neither names nor whole numbers.
    """
    import datasets

    splits = _split_by_column(splits)
    chosen = choose_split([key for key in splits if key], split, name)
    keys = list(splits) if chosen in (None, ALL) else [chosen]
    parts = [splits[key] for key in keys]
    rows = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    image_column = _pick(rows, columns.images, name, "image_column")
    label_column = next((c for c in columns.labels if c in rows.column_names), None)
    if label_column is None and columns.required:
        label_column = _pick(rows, columns.labels, name, "label_column")
    ids = _ids(rows, [(key, len(splits[key])) for key in keys])
    classes: tuple[str, ...] = ()
    labels = None
    if label_column is not None:
        classes, labels = _labels(rows, label_column, list(splits.values()), name)
    only = _stored_files(rows, image_column, name)
    reader = RowReader(only, image_column, ids, folders or _hub_folders(), limits)
    return ImageDataset(name, chosen, classes, ids, labels, reader, reader.digest)


def _hub_folders() -> list[Path]:
    """Where the hub's libraries keep what they download and unpack."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]


def _split_by_column(splits: Mapping[str, "Dataset"]) -> Mapping[str, "Dataset"]:
    rows = splits.get("")
    if rows is None or "split" not in rows.column_names:
        return splits
    feature = rows.features["split"]
    values = rows["split"][:]
    if hasattr(feature, "int2str"):
        values = feature.int2str(values)
    kept: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        kept.setdefault(str(value), []).append(index)
    return {value: rows.select(indices) for value, indices in kept.items()}


def _pick(rows: "Dataset", wanted: Sequence[str], name: str, setting: str) -> str:
    for column in wanted:
        if column in rows.column_names:
            return column
    raise ValueError(
        f"{name} has no column {' or '.join(map(repr, wanted))}: "
        f"choose another {setting} ({printable(', '.join(rows.column_names))})"
    )


def _ids(rows: "Dataset", counts: Sequence[tuple[str, int]]) -> list[str]:
    for column in ID_COLUMNS:
        if column in rows.column_names:
            values = rows[column][:]
            if None not in values and len({str(value) for value in values}) == len(values):
                return [str(value) for value in values]
    return [f"{key}/{row}" if key else str(row) for key, count in counts for row in range(count)]


def _labels(
    rows: "Dataset", column: str, parts: Sequence["Dataset"], name: str
) -> tuple[tuple[str, ...], list[int] | None]:
    """Classes and class ids of a column, over all splits; both empty where no row has a label."""
    import datasets

    feature, values = rows.features[column], rows[column][:]
    where = f"{name}: the column {column!r}"
    remedy = f": choose another label_column ({printable(', '.join(rows.column_names))})"
    some = [part for part in parts if part.features.get(column) == feature]
    if isinstance(feature, datasets.List | datasets.LargeList):
        lists = [held for part in some for held in part[column][:]]
        values, feature = one_each(values, where, remedy), feature.feature
        flat = all(isinstance(value, Hashable) for value in values)
        present = {one for held in lists for one in held or ()} if flat else ()
    elif isinstance(feature, datasets.Value | datasets.ClassLabel):
        present = {value for part in some for value in part.unique(column)}
    else:
        present = ()  # Records have no set of what occurs in them.
    classes, ids = class_ids(values, present, where, remedy)
    if not isinstance(feature, datasets.ClassLabel):
        return classes, ids
    # A set that was filtered keeps the names of all; those that no picture has are no classes.
    if classes and int(classes[-1]) >= len(feature.names):
        raise ValueError(
            f"{where} holds the class {classes[-1]}, but names only {len(feature.names)}{remedy}"
        )
    return tuple(feature.names[int(number)] for number in classes), ids


def _stored_files(rows: "Dataset", column: str, name: str) -> "Dataset":
    """The column of pictures alone, as the bytes or the paths that are stored."""
    import datasets

    only = rows.select_columns([column])
    feature: Any = only.features[column]
    if isinstance(feature, datasets.Image):
        return only.cast_column(column, datasets.Image(decode=False))
    kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    if kind in STORED or (isinstance(feature, Mapping) and "bytes" in feature):
        return only
    raise ValueError(
        f"{name}: the column {column!r} holds no pictures but {kind}: "
        f"choose another image_column ({printable(', '.join(rows.column_names))})"
    )
