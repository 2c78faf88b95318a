"""What the next command's line says of the pictures, which a store does not hold."""

from pathlib import Path

from revelio.analysis.config import FROM_STORE
from revelio.data.config import DataConfig
from revelio.following import flags


def pictures_of_store(store: Path, data: DataConfig) -> list[str]:
    """What :func:`pictures` gives for a store, if this command was not told where its pictures are itself."""
    from revelio.trust import read_object

    if data.source != FROM_STORE:
        return [*flags(data, "data")]
    return pictures(read_object(store / "manifest.json").get("dataset"))


def pictures(dataset: str | None) -> list[str]:
    """The flag that says where a store's pictures are; nothing for a data set that is known by name.

    Of a folder a store knows the bare name only: its place is for the user to fill in.
    """
    from revelio.data.registry import is_registered

    return [] if dataset and is_registered(dataset) else ["--data.source", "FOLDER"]
