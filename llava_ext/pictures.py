"""Which pictures a cache's rows are of: by name, size and what they hold.

    cat.jpg|48213|3f0c...      the file's name, its bytes, a hash of them (revelio.data.contents)

Hashes are read once: ``pictures.json`` in the cache keeps each with the size and the time of change of its
file, and a file that still has both is not read again.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from revelio.data.contents import digest_of, digests
from revelio.files import write_whole
from revelio.trust import read_object

STAMPS = "pictures.json"


def plain_ids(folder: Path, names: Sequence[str]) -> list[str]:
    """Ids as the first version made them, of name and size only: an edit of equal size is not seen."""
    return [f"{name}|{(folder / name).stat().st_size}" for name in names]


def picture_ids(
    folder: Path, names: Sequence[str], cache: Path, *, keep: bool = False
) -> list[str]:
    """Ids of pictures.

    Args:
        folder: of the pictures.
        names: their files.
        cache: the folder whose ``pictures.json`` holds hashes that were read before.
        keep: write that file, where a picture had to be read.
    """
    stamps = _read_stamps(cache / STAMPS)
    stats = [(folder / name).stat() for name in names]
    now = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    known = [stamps.get(name, [])[:2] == stamp for name, stamp in zip(names, now, strict=True)]
    unread = [number for number, is_known in enumerate(known) if not is_known]
    found = digests(lambda place: digest_of(folder / names[unread[place]]), len(unread))
    for number, digest in zip(unread, found, strict=True):
        stamps[names[number]] = [*now[number], digest]
    if keep and unread:
        write_whole(cache / STAMPS, json.dumps({"format": 1, "pictures": stamps}))
    return [f"{name}|{stamps[name][0]}|{stamps[name][2]}" for name in names]


def _read_stamps(path: Path) -> dict[str, list[Any]]:
    """What was read before; nothing where the file is missing or damaged: pictures are read again."""
    with suppress(ValueError):
        found = read_object(path).get("pictures")
        if isinstance(found, dict) and all(_is_stamp(stamp) for stamp in found.values()):
            return found
    return {}


def _is_stamp(value: Any) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [int, int, str]
