"""What the next command's line says of inputs, which a result tells apart without saying where they are.

A run folder's config does say: of a store the extraction's, of top images their k-SAE's.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from revelio.analysis.config import FROM_STORE
from revelio.backbones.config import BackboneConfig
from revelio.config import read_yaml, structure
from revelio.data.config import DataConfig
from revelio.following import flags, following
from revelio.trust import read_object

# The settings that say which data set it is and how it is read, and not which of its images are taken.
WHERE = ("root", "revision", "image_column", "label_column", "labels")


def pictures_of_store(store: Path, data: DataConfig) -> list[str]:
    """What :func:`pictures` gives for a store, if this command was not told where its pictures are itself."""
    if data.source != FROM_STORE:
        return [*flags(data, "data")]
    return pictures(read_object(store / "manifest.json").get("dataset"), store)


def pictures(dataset: str | None, store: Path | str | None = None) -> list[str]:
    """The flags that say where a store's pictures are; nothing for a data set that is known by name.

    Of a folder a store knows the bare name only: where its extraction's config is gone, or speaks of a place
    that is not there, the place is for the user to fill in.
    """
    from revelio.data.registry import is_registered

    data = None if store is None else extracted_from(Path(store))
    if dataset and is_registered(dataset):
        return [] if data is None else [*flags(data, "data", *WHERE)]
    return ["--data.source", "FOLDER"] if data is None else [*flags(data, "data")]


def gallery_line(dataset: str | None, store: Path | str, *inputs: object) -> str:
    """The line that shows latents in a gallery; of a store of some cells, which a gallery can't show, why."""
    manifest = Path(store) / "manifest.json"
    if manifest.is_file() and read_object(manifest).get("cells") is not None:
        return "note: a gallery shows whole images: extract grids for it (--pool none)"
    return following("gallery", *inputs, *pictures(dataset, store))


def extracted_from(store: Path) -> DataConfig | None:
    """The data set that a store's extraction read, all of it; None: its config or the pictures are gone."""
    from revelio.data.registry import is_registered

    try:
        values = _settings(store.resolve().parent).get("data")
        data = structure(DataConfig, values if isinstance(values, Mapping) else {})
    except ValueError:  # another version's
        return None
    needed = [data.root, data.labels, None if is_registered(data.source) else Path(data.source)]
    if not values or not all(path is None or path.exists() for path in needed):
        return None
    return replace(data, limit=None, per_class=None)


def model_of(store: Path, name: str | None) -> list[str]:
    """The flags of the model that made a store.

    Args:
        store: the store, whose extraction's config says which folder or function it was, and how it was read.
        name: what the manifest calls it: a folder's bare name, or a model's own.
    """
    try:
        config = structure(BackboneConfig, _settings(store.resolve().parent)["backbone"])
    except (KeyError, TypeError, ValueError):  # another version's, or none
        return ["--backbone.name", name or "BACKBONE"]
    told = flags(config, "backbone", "revision", "image_size", "dtype", "attention")
    return ["--backbone.name", config.name, *told]


def sources_of(top: Path, made_from: Mapping[str, Any]) -> tuple[Path | str, Path | str]:
    """The store and the k-SAE of top images that lie in their k-SAE's run; words to fill in where they don't.

    Args:
        top: the folder of the top images.
        made_from: what they say that they were made from.
    """
    from revelio.hub import FINAL
    from revelio.run_dir import read_json, sha256

    run = top.parent if top.name else top.resolve().parent
    said, config = made_from.get("ksae", {}), run / FINAL / "config.json"
    found = read_json(config) if config.is_file() else {}
    sizes = ("d", "n", "k", "mode")
    if not found or any(found.get(name) != said.get(name) for name in sizes):
        return "STORE", "KSAE"
    stores, wanted = _settings(run).get("store"), made_from.get("store", {}).get("sha256")
    for path in map(Path, stores if isinstance(stores, list) else []):
        manifest = path / "manifest.json"
        if manifest.is_file() and sha256(manifest) == wanted:
            return path, run
    return "STORE", run


def _settings(run: Path) -> dict[str, Any]:
    """A run's config, as plain values; nothing where there is none."""
    config = run / "config.yaml"
    return read_yaml(config) if config.is_file() else {}
