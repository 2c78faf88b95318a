"""LLaVA's JSON data, read as it is and checked before anything is trained.

    [{"id": "…", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                      {"from": "gpt", "value": "A cat."}]}, …]

``image`` is a file name, a list of them, or not there at all (text only). Each ``<image>`` in what the human
says stands for one of them, in order. A record that breaks this is an error of one line that names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ext.config import IMAGE_TOKEN
from llava_ext.conversation import Turn
from revelio.runs import read_json

ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Record:
    """One conversation about some images.

    Attributes:
        id: the record's own, or its place in the file.
        images: file names, relative to the image folder.
        turns: user and assistant by turns; the last one is the assistant's.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_records(
    path: Path, images: Path | None = None, *, limit: int | None = None
) -> list[Record]:
    """Read and check a data file.

    Args:
        path: the JSON file.
        images: the folder of the images, which must all be there; None where no record has any.
        limit: only the first so many records.

    Raises:
        ValueError: the file or a record is wrong; the message names it.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of records, as LLaVA's data files do")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: it must be at least 1, or none at all")
    if images is not None and not images.is_dir():
        raise ValueError(f"no image folder at {images}: choose it with --data.images")
    records = [_record(entry, f"{path}: record {n}") for n, entry in enumerate(entries[:limit])]
    _check_images(records, images, path)
    return records


def image_names(records: Sequence[Record]) -> list[str]:
    """Every image of the records once, in the order of their first use."""
    return list(dict.fromkeys(name for record in records for name in record.images))


def _record(entry: Any, where: str) -> Record:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is a {type(entry).__name__}, not `id`, `image`, `conversations`")
    identity = str(entry.get("id", where.rpartition(" ")[2]))
    where = f"{where} (id {identity!r})" if "id" in entry else where
    conversations = entry.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(f"{where} has no `conversations`")
    turns = tuple(_turn(turn, where) for turn in conversations)
    wanted = [("user", "assistant")[number % 2] for number in range(len(turns))]
    if [turn.role for turn in turns] != wanted or len(turns) % 2:
        raise ValueError(
            f"{where} must go human, gpt, human, gpt: it goes "
            f"{', '.join(str(turn['from']) for turn in conversations)}"
        )
    images = _images(entry.get("image"), where)
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
    if placeholders != len(images):
        raise ValueError(
            f"{where} has {len(images)} images and {placeholders} times {IMAGE_TOKEN}: "
            "they must be as many"
        )
    return Record(identity, images, turns)


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise ValueError(f"{where} has a turn without `from` and `value`")
    role = ROLES.get(str(turn.get("from")))
    if role is None:
        raise ValueError(f"{where} has a turn from {turn.get('from')!r}: allowed are human, gpt")
    if role == "assistant" and IMAGE_TOKEN in turn["value"]:
        raise ValueError(f"{where} has {IMAGE_TOKEN} in what gpt says: only the human shows images")
    return Turn("user" if role == "user" else "assistant", turn["value"])


def _images(value: Any, where: str) -> tuple[str, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where} has `image` {value!r}: it must be a file name or a list of them")
    return tuple(names)


def _check_images(records: Sequence[Record], folder: Path | None, path: Path) -> None:
    seen: set[str] = set()
    for record in records:
        for name in record.images:
            if folder is None:
                raise ValueError(
                    f"{path}: record {record.id!r} has an image: give the folder of the images "
                    "with --data.images"
                )
            if name not in seen and not (folder / name).is_file():
                raise ValueError(f"{path}: record {record.id!r}: no image {name} in {folder}")
            seen.add(name)
