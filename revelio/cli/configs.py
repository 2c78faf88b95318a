"""List the experiments' YAML files that come with Revelio, or copy one to edit and give as --config.

    revelio configs                                   their names, a line each
    revelio configs copy ksae/quick                   writes quick.yaml into this folder
    revelio configs copy extract/sd15-pets --out my

An existing file is never overwritten.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from revelio.bounds import OutFolder, PathFields
from revelio.following import following
from revelio.text_tables import columns
from revelio.wording import did_you_mean


@dataclass(frozen=True)
class Config(PathFields):
    """`revelio configs` as flags."""

    action: Annotated[Literal["list", "copy"], Positional] = "list"
    """`list` what there is, or `copy` one."""

    name: Annotated[str | None, Positional] = None
    """The one to copy, as the list names it."""

    out: OutFolder = Path(".")
    """The folder that gets the copy."""


def run(config: Config) -> None:
    """List or copy."""
    found = shipped_configs()
    if config.action == "list":
        if config.name is not None:
            raise ValueError(f"list takes no name: leave out {config.name}")
        print(columns([(name, about(path)) for name, path in found.items()]))
        print(f"\n{following('configs', 'copy', next(iter(found)))}")
    else:
        copied = copy(config.name, found, config.out)
        print(f"wrote {copied}\n{following(*_command(str(config.name)), '--config', copied)}")


def _command(name: str) -> list[str]:
    """The command that takes a config: its folder, or the beginning of its name, says which."""
    kind, _, rest = name.partition("/")
    if kind == "analysis":
        return [
            next(
                one
                for one in ("top-images", "pca-maps", "purity", "gallery")
                if rest.startswith(one)
            )
        ]
    if kind == "steering":
        return ["train-ksae" if rest.endswith("-ksae") else "extract-text"]
    known = {"ksae": ["train-ksae"], "diffc": ["train-diffc"], "llava": ["llava", "pretrain"]}
    return known.get(kind, [kind])


def shipped_configs() -> dict[str, Path]:
    """Every YAML by its name: in a wheel, or in the repository this runs from.

    Raises:
        ValueError: this copy of Revelio has none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "shipped_configs", package.parent / "configs"):
        if folder.is_dir():
            paths = sorted(folder.rglob("*.yaml"))
            return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}
    raise ValueError("this copy of Revelio has no configs: install it again")


def about(path: Path) -> str:
    """The first sentence of the YAML's first comment."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# ").strip())
    return re.split(r"\.\s+(?=[A-Z])", " ".join(words))[0].rstrip(".")


def copy(name: str | None, found: dict[str, Path], out: Path) -> Path:
    """The copy of a shipped config.

    Raises:
        ValueError: there is no such config, or a file where the copy would be.
    """
    from revelio.files import check_folder, write_whole

    if name is None:
        raise ValueError("copy needs a name: `revelio configs` lists them")
    source = found.get(name.removesuffix(".yaml"))
    if source is None:
        hint = did_you_mean(name, found)
        raise ValueError(f"there is no config {name}: {hint}`revelio configs` lists all")
    target = out / source.name
    if target.exists():
        raise ValueError(f"{target} is there already and stays as it is: choose another folder")
    check_folder(out)
    write_whole(target, source.read_text(encoding="utf-8"))
    return target
