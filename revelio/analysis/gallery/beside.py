"""Galleries beside another one: the same images, seen by another layer, timestep or k-SAE."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.outputs import read_record
from revelio.trust import WRONG, path_in, printable, read_object


@dataclass(frozen=True)
class Beside:
    """A written gallery that another one is compared with.

    Attributes:
        path: its folder.
        about: its title, what it is of, and the rows that it has the other's images at (-1: it has none).
        names: its files, but those of galleries that lie in it.
    """

    path: Path
    about: dict[str, Any]
    names: list[str]

    def copy(self, folder: Path) -> None:
        """Copy its files into a folder."""
        for name in self.names:
            to = folder / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path_in(self.path, name, what="a file of the gallery"), to)


def opened(path: Path, ids: Sequence[str]) -> Beside:
    """A gallery of the images ``ids``.

    Raises:
        ValueError: the folder holds no gallery of this version, or one of none of these images.
    """
    names = read_record(path).get("gallery", [])
    data = read_object(path / "gallery.json") if "gallery.json" in names else {}
    if data.get("format") != 2 or "assets/compare.js" not in names:
        raise ValueError(f"{printable(path)} holds no gallery of this version: write it again")
    try:
        row_of = {name: row for row, name in enumerate(data["images"]["ids"])}
        about = _about(data)
    except WRONG as error:
        raise ValueError(f"{printable(path)} holds no gallery: write it again") from error
    rows = [row_of.get(name, -1) for name in ids]
    if max(rows, default=-1) < 0:
        raise ValueError(
            f"the gallery at {printable(path)} has none of the images: compare galleries of the same ones"
        )
    # Most often the rows are the same, and a list of them says nothing.
    about |= {} if rows == list(range(len(ids))) else {"rows": rows}
    return Beside(path, about, [name for name in names if not name.startswith("beside/")])


def _about(data: Mapping[str, Any]) -> dict[str, Any]:
    meta = data["meta"]
    parts = {"layer": "", "timestep": "t = ", "k": "k = ", "n": "n = "}
    said = [f"{word}{meta[key]}" for key, word in parts.items() if meta.get(key) is not None]
    return {"title": f"{data['title']} ({', '.join(said)})"}
