"""Prompts out of a text file (one a line), a CSV file, or a Hugging Face data set.

A CSV's columns with a seed and a guidance scale are taken where they are there, under the names of the I2P
prompts (`sd_seed`, `sd_guidance_scale`) and of their evaluation (`evaluation_seed`, `evaluation_guidance`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.steering.edits import check_number
from revelio.trust import printable, read_csv, read_text

COLUMN = "prompt"
SEEDS = ("evaluation_seed", "sd_seed", "seed")
MOST_SEED = 2**62
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        id: its place in the file, counted from 0.
        text: what is drawn.
        seed: of its picture, where the file says one.
        guidance: the guidance scale, where the file says one.
        wanted: the class that it names, where the file says one.
        group: which of several kinds of prompts it is, where the file says so.
    """

    id: str
    text: str
    seed: int | None = None
    guidance: float | None = None
    wanted: str | None = None
    group: str | None = None


def read_prompts(
    source: str,
    column: str = COLUMN,
    split: str | None = None,
    *,
    class_column: str | None = None,
    group_column: str | None = None,
) -> list[Prompt]:
    """The prompts of a source.

    Args:
        source: a `.csv` or `.tsv` file with a header, any other file of one prompt a line, or a hub id or
            folder of a Hugging Face data set.
        column: of a table, the column with the prompts.
        split: of a data set; None: its only one, or `train`.
        class_column: the column with the class that each prompt names; then the source must be a table.
        group_column: the column with the group that each prompt belongs to.

    Raises:
        ValueError: there is no such source, it has no prompts or no such column, or a number in it is none.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() not in (".csv", ".tsv"):
        if class_column is not None:
            raise ValueError(
                f"{printable(source)} is no .csv or .tsv table: the class that a prompt names is a column"
            )
        found = _lines(path)
    else:
        rows = _csv_rows(path) if path.is_file() else _dataset_rows(source, split)
        found = _of_table(rows, column, source, class_column, group_column)
    if not found:
        raise ValueError(f"{printable(source)} holds no prompts: give at least one")
    return found


def prompts_of(texts: Iterable[str]) -> list[Prompt]:
    """Prompts given as texts."""
    return [Prompt(f"{index:06d}", text) for index, text in enumerate(texts)]


def _lines(path: Path) -> list[Prompt]:
    return prompts_of(line.strip() for line in read_text(path).splitlines() if line.strip())


def _csv_rows(path: Path) -> list[dict[str, str]]:
    return read_csv(path, "\t" if path.suffix.lower() == ".tsv" else ",")


def _dataset_rows(source: str, split: str | None) -> Iterable[Mapping[str, Any]]:
    from revelio.data.sources.huggingface import (
        hub_splits,
        is_dataset_id,
        is_saved_dataset,
        saved_splits,
    )

    path = Path(source)
    if not path.exists() and not is_dataset_id(source):
        raise ValueError(
            f"there is no file of prompts at {printable(source)}: give one prompt a line, a .csv or .tsv "
            "table, or a data set (a folder, or its hub id `owner/name`); prompts themselves are texts"
        )
    if path.exists() and not is_saved_dataset(path):
        raise ValueError(f"{printable(source)} is neither a file of prompts nor a saved data set")
    splits = saved_splits(path) if path.exists() else hub_splits(source)
    name = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if name not in splits:
        raise ValueError(f"{printable(source)} has no split {name!r}: it has {', '.join(splits)}")
    return splits[name]  # type: ignore[return-value]


def _of_table(
    rows: Iterable[Mapping[str, Any]],
    column: str,
    source: str,
    class_column: str | None,
    group_column: str | None,
) -> list[Prompt]:
    found: list[Prompt] = []
    for index, row in enumerate(rows):
        where = f"row {index + 1} of {printable(source)}"
        text = _cell(row, column, where)
        if not text:
            continue
        wanted = None if class_column is None else _cell(row, class_column, where)
        if wanted == "":
            raise ValueError(f"{where} says no class in column {class_column!r}")
        found.append(
            Prompt(
                f"{index:06d}",
                text,
                _seed(row, where),
                _guidance(row, where),
                wanted,
                None if group_column is None else _cell(row, group_column, where),
            )
        )
    return found


def _cell(row: Mapping[str, Any], column: str, where: str) -> str:
    if not isinstance(row.get(column), str):
        names = ", ".join(printable(name) for name in row if name is not None)
        raise ValueError(f"{where} has no text in column {column!r}: it has {names}")
    return row[column].strip()


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of these columns that has a value, and the value; None where none has."""
    return next(
        ((name, row[name]) for name in names if row.get(name) not in (None, "")), ("", None)
    )


def _seed(row: Mapping[str, Any], where: str) -> int | None:
    name, value = _first(row, SEEDS)
    if value is None:
        return None
    # A table may hold whole numbers as 7.0; a double has not all digits of a long one.
    digits = str(value).strip().removesuffix(".0")
    if not digits.removeprefix("-").isdecimal() or len(digits) > 19 or abs(int(digits)) > MOST_SEED:
        raise ValueError(f"`{name}` of {where} is {value!r}: give a whole number below 2^62")
    return int(digits)


def _guidance(row: Mapping[str, Any], where: str) -> float | None:
    name, value = _first(row, GUIDANCE)
    if value is None:
        return None
    if (number := check_number(value, f"`{name}` of {where}")) < 0:
        raise ValueError(f"`{name}` of {where} is {value!r}: give 0 or more")
    return number
