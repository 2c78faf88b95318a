"""Which pictures a classifier was trained on: hashes in ``final/``, so that testing on them is noticed.

A picture is known by its pixels, whatever its name and folder; a row of a store by its id and the name of
the data set, where there is no picture to look at. Only hashes are kept, which tell nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.diffc.sources import GridSource, LiveGrids, short_hash
from revelio.hub import trained
from revelio.run_dir import write_json
from revelio.trust import printable, read_object

FILE = "trained_on.json"
FORMAT = 1


@dataclass(frozen=True)
class TrainedOn:
    """Hashes of the training and validation images.

    Attributes:
        pictures: of their pixels; empty where stored grids were trained on.
        ids: of their ids with the name of the data set; empty where that is unknown.
    """

    pictures: frozenset[str]
    ids: frozenset[str]

    def holds(self, source: GridSource, dataset: str | None) -> list[bool]:
        """For each image of a source whether it was trained on; pictures decide where there are any."""
        if isinstance(source, LiveGrids) and self.pictures:
            return [one in self.pictures for one in source.picture_hashes()]
        return [one in self.ids for one in _id_hashes(source.ids, dataset)]

    def save(self, folder: Path) -> None:
        """Write the hashes into a classifier's folder."""
        lists = {"pictures": sorted(self.pictures), "ids": sorted(self.ids)}
        write_json(folder / FILE, {"format": FORMAT} | lists)


def trained_on(source: GridSource, dataset: str | None) -> TrainedOn:
    """The hashes of all images of a source; reads the pictures that were not read yet."""
    pictures = source.picture_hashes() if isinstance(source, LiveGrids) else []
    ids = [one for one in _id_hashes(source.ids, dataset) if one]
    return TrainedOn(frozenset(pictures), frozenset(ids))


def load_trained_on(model: str | Path) -> TrainedOn | None:
    """What the classifier in a folder or at a hub id was trained on; None where it does not say.

    Raises:
        ValueError: the file is there and is no such file.
    """
    model = trained(model)
    path = Path(model) / FILE
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(str(model), FILE))
        except (OSError, ValueError):
            return None
    if not path.exists():
        return None
    values = read_object(path)
    found = [values.get(name) for name in ("pictures", "ids")]
    if values.get("format") != FORMAT or not all(_are_hashes(part) for part in found):
        raise ValueError(f"{printable(path)} is no list of what a Diff-C was trained on")
    return TrainedOn(frozenset(values["pictures"]), frozenset(values["ids"]))


def _id_hashes(ids: Sequence[str], dataset: str | None) -> list[str]:
    """Of each id within its data set; "" where the set has no name, since ids alone say nothing."""
    if not dataset:
        return [""] * len(ids)
    return [short_hash(f"{dataset}\0{one}".encode("utf-8", "surrogateescape")) for one in ids]


def _are_hashes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
