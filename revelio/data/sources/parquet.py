"""Parquet files as rows, in memory that the files' sizes bound."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revelio.data.splits import split_name
from revelio.trust import MIB

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

# Below this size parquet files are held in memory; above it, `datasets` maps its own copy from disk.
IN_MEMORY_BYTES = 2**30
# What rows may take, decoded: a parquet file can hold one picture and refer to it a billion times.
GROWTH, SLACK = 32, 64 * MIB
BATCH_ROWS = 1 << 14
# Rows about pictures in files beside it, not a data set by itself.
METADATA = "metadata.parquet"


def parquet_files(path: Path) -> list[Path]:
    """The parquet files that ``path`` is or holds (directly, in ``data/``, or a folder a split)."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    inside = [*path.glob("*.parquet"), *path.glob("*/*.parquet")]
    return sorted(one for one in inside if not one.name.startswith(".") and one.name != METADATA)


def parquet_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of one file.

    Raises:
        ValueError: it can't be read.
    """
    try:
        return [row for batch in _bounded(file) for row in batch.to_pylist()]
    except Exception as error:
        raise ValueError(f"{file.name} can't be read as parquet: {first_line(error)}") from error


def parquet_splits(files: Sequence[Path]) -> dict[str, "Dataset"]:
    """The rows of parquet files by split, told from names (``train-00000-of-00001.parquet``).

    Raises:
        ValueError: a file can't be read.
    """
    groups: dict[str, list[Path]] = {}
    for file in files:
        words = (file.stem.replace(".", "-").replace("_", "-").split("-")[0], file.parent.name)
        names = [name for word in words if (name := split_name(word)) is not None]
        groups.setdefault(names[0] if names else "", []).append(file)
    if "" in groups and len(groups) > 1:
        raise ValueError(
            f"{groups[''][0]} names no split, but others beside it do: name parquet files after "
            "their split (train, validation, test, ...)"
        )
    return {split: _read_parquet(group) for split, group in groups.items()}


def _read_parquet(files: Sequence[Path]) -> "Dataset":
    import datasets
    import pyarrow
    import pyarrow.parquet
    from datasets.table import InMemoryTable

    try:
        if sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES:
            for file in files:
                for _ in _bounded(file):
                    pass
            return datasets.Dataset.from_parquet([str(file) for file in files])  # type: ignore[return-value]
        tables = [
            pyarrow.Table.from_batches(
                _bounded(file), schema=pyarrow.parquet.read_schema(file, memory_map=False)
            )
            for file in files
        ]
        return datasets.Dataset(InMemoryTable(pyarrow.concat_tables(tables)))
    except Exception as error:
        names = ", ".join(file.name for file in files[:3])
        raise ValueError(f"{names} can't be read as parquet: {first_line(error)}") from error


def _decoded_bytes(batch: "RecordBatch") -> int:
    """What a batch takes once its columns are no longer kept as dictionaries."""
    import pyarrow
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made at run time
    total, columns = batch.nbytes, list(batch.columns)
    while columns:
        column = columns.pop()
        if isinstance(column, pyarrow.StructArray):
            columns += column.flatten()
        elif pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            columns.append(column.flatten())
        elif isinstance(column, pyarrow.DictionaryArray):
            with suppress(pyarrow.ArrowNotImplementedError):  # numbers, which take no room
                lengths = compute.binary_length(column.dictionary).take(column.indices)
                total += compute.sum(lengths).as_py() or 0
    return total


def _bounded(file: Path) -> "Iterator[RecordBatch]":
    """The rows of a parquet file, in memory that its size bounds.

    Raises:
        ValueError: decoded they take far more than the file.
    """
    import pyarrow.parquet

    reader = pyarrow.parquet.ParquetFile(file)
    about = reader.metadata
    groups = [about.row_group(number).total_byte_size for number in range(about.num_row_groups)]
    limit = SLACK + GROWTH * file.stat().st_size
    # No value is longer than its row group unpacked, so no batch takes more than the limit.
    rows = max(1, min(BATCH_ROWS, limit // max(1, *groups))) if groups else 1
    held = sum(groups)
    if held <= limit:
        held = 0
        for batch in reader.iter_batches(batch_size=rows):
            held += _decoded_bytes(batch)
            if held > limit:
                break
            yield batch
    if held > limit:
        raise ValueError(
            f"its rows take more than {limit:,} bytes, {GROWTH} times the file: write it again without "
            "a dictionary for the pictures, or with each of them once"
        )


def first_line(error: BaseException) -> str:
    """An error of a library in one line, after its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
