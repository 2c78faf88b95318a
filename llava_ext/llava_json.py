"""LLaVA's JSON data, read as it is and checked before anything is trained.

    [{"id": "…", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                      {"from": "gpt", "value": "A cat."}]}, …]

``image`` is a file name, a list of them, or not there at all (text only). Each ``<image>`` in what the human
says stands for one of them, in order. Records that break this are one error
that names them all. JSON Lines, a record a line, are read as well.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_ext.config import IMAGE_TOKEN
from llava_ext.conversation import Turn, check_placed
from revelio.trust import leads_out, parse_json, printable, read_text
from revelio.wording import plural

# LLaVA's largest file, of 665,000 conversations, has 1 GB.
DATA_LIMIT = 1 << 33
# Wrong records that a message gives the reasons of, and those it only numbers.
SHOWN, NAMED = 5, 40

Bad = Literal["stop", "skip"]
# A folder and pictures in it -> why each that can't be used can't.
Decode = Callable[[Path, Sequence[str]], Mapping[str, str]]

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
    path: Path,
    images: Path | None = None,
    *,
    limit: int | None = None,
    bad: Bad = "stop",
    decode: Decode | None = None,
    files: bool = True,
) -> list[Record]:
    """Read and check a data file.

    Args:
        path: the file, of JSON or of JSON Lines.
        images: the folder of the images, which must all be there; None where no record has any.
        limit: only the first so many records.
        bad: what a wrong record does: ``stop``, or be left out, with a warning that names all such.
        decode: looks into every picture (:func:`llava_ext.images.damaged`), so that a damaged one is found
            here; None: only whether the files are there is seen.
        files: whether the pictures must be there; a cache of the towers' grids stands for them.

    Raises:
        ValueError: the file or some records are wrong, or all are; the message names them all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: it must be at least 1, or none at all")
    entries = _entries(path)[:limit]
    if files and images is not None and not images.is_dir():
        raise ValueError(f"no image folder at {images}: choose it by `data.images`")
    records: list[Record] = []
    wrong: list[tuple[str, str]] = []
    # What is wrong with each image, None where nothing is.
    found: dict[str, str | None] = {}
    if decode and images is not None:
        found |= decode(images, _names(entries))
    for number, entry in enumerate(entries):
        try:
            record = _record(entry, f"record {number}")
            if files:
                _check_images(record, number, images, found)
        except ValueError as error:
            wrong.append((str(number), str(error)))
        else:
            records.append(record)
    refuse(wrong, len(entries), bad, path)
    return records


def refuse(
    wrong: Sequence[tuple[str, str]], total: int, bad: Bad, source: Path | None = None
) -> None:
    """Name all records that can't be used; with ``skip`` in a warning, unless none is left.

    Args:
        wrong: what each is called, and what is wrong with it.
        total: of how many.
        bad: what such a record does.
        source: the records' file.

    Raises:
        ValueError: there are some, and they are not left out.
    """
    if not wrong:
        return
    where = f"{printable(source)}: " if source else ""
    said, all_wrong = report(wrong, total), len(wrong) == total
    if bad == "stop" or all_wrong:
        remedy = "" if all_wrong else " (`bad_records: skip` leaves them out)"
        raise ValueError(f"{where}{said}{remedy}")
    warnings.warn(f"{where}left out: {said}", stacklevel=3)


def report(wrong: Sequence[tuple[str, str]], total: int, what: str = "wrong") -> str:
    """All wrong records in one line: the first ones with what is wrong, of the others the names.

    Args:
        wrong: what each is called, and what is wrong with it.
        total: of how many.
        what: they are.
    """
    if len(wrong) == 1:
        return wrong[0][1]
    reasons = "; ".join(reason for _, reason in wrong[:SHOWN])
    others = [name for name, _ in wrong[SHOWN : SHOWN + NAMED]]
    more = f"; also records {', '.join(others)}" if others else ""
    rest = len(wrong) - SHOWN - NAMED
    return f"{len(wrong):,} of {plural(total, 'record')} are {what}: {reasons}{more}" + (
        f" and {rest:,} more" if rest > 0 else ""
    )


def _entries(path: Path) -> list[Any]:
    """The records of a JSON list, or of JSON Lines, as they stand in the file.

    Raises:
        ValueError: it is neither, or empty.
    """
    text = read_text(path, limit=DATA_LIMIT)
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix in (".jsonl", ".ndjson") or _begins_lines(lines):
        entries = [_line(line) for line in lines]
    else:
        entries = parse_json(text, printable(path))
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{printable(path)} must hold a list of records, as LLaVA's data files do, or a record a line"
        )
    return entries


def _begins_lines(lines: Sequence[str]) -> bool:
    return len(lines) > 1 and isinstance(_line(lines[0]), dict)


def _line(line: str) -> Any:
    """The value of one line; the error itself where it is no JSON, so that all can be reported."""
    try:
        return parse_json(line, "it")
    except ValueError as error:
        return error


def image_names(records: Sequence[Record]) -> list[str]:
    """Every image of the records once, in the order of their first use."""
    return list(dict.fromkeys(name for record in records for name in record.images))


def _record(entry: Any, where: str) -> Record:
    if isinstance(entry, ValueError):
        raise ValueError(f"{where}: {entry}")
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is a {type(entry).__name__}, not `id`, `image`, `conversations`")
    identity = str(entry.get("id", where.rpartition(" ")[2]))
    where = f"{where} (id {identity!r})" if "id" in entry else where
    if "video" in entry:
        raise ValueError(f"{where} has a `video`: only images can be learnt from")
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
    check_placed(where, placeholders, len(images), "name in `image`")
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


def _names(entries: Sequence[Any]) -> list[str]:
    """Every picture inside the folder that an entry names, whatever else is wrong with it."""
    values = [entry.get("image") for entry in entries if isinstance(entry, Mapping)]
    several = [value if isinstance(value, list) else [value] for value in values]
    return list(
        dict.fromkeys(str(name) for some in several for name in some if not leads_out(name))
    )


def _check_images(
    record: Record, number: int, folder: Path | None, found: dict[str, str | None]
) -> None:
    """Refuse images that are not in the folder; ``found`` remembers what was looked for."""
    where = f"record {number} (id {record.id!r})"
    for name in record.images:
        if folder is None:
            raise ValueError(f"{where} has an image: give the folder of the images (`data.images`)")
        if leads_out(name):
            raise ValueError(f"{where}: {name!r} is no image inside {folder}")
        if name not in found:
            here = (folder / name).is_file()
            found[name] = None if here else f"no image {name} in {folder}"
        if reason := found[name]:
            raise ValueError(f"{where}: {reason}")
