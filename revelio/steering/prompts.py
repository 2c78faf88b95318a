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
    """

    id: str
    text: str
    seed: int | None = None
    guidance: float | None = None


def read_prompts(source: str, column: str = COLUMN, split: str | None = None) -> list[Prompt]:
    """The prompts of a source.

    Args:
        source: a `.csv` or `.tsv` file with a header, any other file of one prompt a line, or a hub id or
            folder of a Hugging Face data set.
        column: of a table, the column with the prompts.
        split: of a data set; None: its only one, or `train`.

    Raises:
        ValueError: there is no such source, it has no prompts or no such column, or a number in it is none.
    """
    path = Path(source)
    if path.is_file():
        table = path.suffix.lower() in (".csv", ".tsv")
        found = _of_table(_csv_rows(path), column, source) if table else _lines(path)
    else:
        found = _of_table(_dataset_rows(source, split), column, source)
    if not found:
        raise ValueError(f"{printable(source)} holds no prompts: give at least one")
    return found


def read_table(source: str, column: str, class_column: str) -> tuple[list[Prompt], list[str]]:
    """Prompts with the class that each names, from a table.

    Raises:
        ValueError: see :func:`read_prompts`; or the source is no table.
    """
    path = Path(source)
    if not path.is_file() or path.suffix.lower() not in (".csv", ".tsv"):
        raise ValueError(f"{printable(source)} is no .csv or .tsv table with a column of classes")
    rows = [row for row in _csv_rows(path) if str(row.get(column) or "").strip()]
    prompts = _of_table(rows, column, source)
    classes = [one.text for one in _of_table(rows, class_column, source)]
    if not prompts or len(classes) != len(prompts):
        raise ValueError(
            f"{printable(source)}: each prompt needs a class in column {class_column!r}, and at least one "
            "prompt must be there"
        )
    return prompts, classes


def prompts_of(texts: Iterable[str]) -> list[Prompt]:
    """Prompts given as texts."""
    return [Prompt(f"{index:06d}", text) for index, text in enumerate(texts)]


def _lines(path: Path) -> list[Prompt]:
    return prompts_of(line.strip() for line in read_text(path).splitlines() if line.strip())


def _csv_rows(path: Path) -> list[dict[str, str]]:
    return read_csv(path, "\t" if path.suffix.lower() == ".tsv" else ",")


def _dataset_rows(source: str, split: str | None) -> Iterable[Mapping[str, Any]]:
    from revelio.data.sources.huggingface import hub_splits, is_saved_dataset, saved_splits

    path = Path(source)
    if path.exists() and not is_saved_dataset(path):
        raise ValueError(f"{printable(source)} is neither a file of prompts nor a saved data set")
    splits = saved_splits(path) if path.exists() else hub_splits(source)
    name = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if name not in splits:
        raise ValueError(f"{printable(source)} has no split {name!r}: it has {', '.join(splits)}")
    return splits[name]  # type: ignore[return-value]


def _of_table(rows: Iterable[Mapping[str, Any]], column: str, source: str) -> list[Prompt]:
    found: list[Prompt] = []
    for index, row in enumerate(rows):
        if not isinstance(row.get(column), str):
            names = ", ".join(printable(name) for name in row if name is not None)
            raise ValueError(
                f"row {index + 1} of {printable(source)} has no text in column {column!r}: it has {names}"
            )
        if row[column].strip():
            where = f"of row {index + 1} of {printable(source)}"
            text, number = row[column].strip(), f"{index:06d}"
            found.append(Prompt(number, text, _seed(row, where), _guidance(row, where)))
    return found


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
        raise ValueError(f"`{name}` {where} is {value!r}: give a whole number below 2^62")
    return int(digits)


def _guidance(row: Mapping[str, Any], where: str) -> float | None:
    name, value = _first(row, GUIDANCE)
    if value is None:
        return None
    if (number := check_number(value, f"`{name}` {where}")) < 0:
        raise ValueError(f"`{name}` {where} is {value!r}: give 0 or more")
    return number
