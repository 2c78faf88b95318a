"""The scripts' command line: one YAML for both stages, flags on top, errors as one line.

    model: {...}           for every script
    cache: ...
    pretrain: {data: {...}, out: ..., stage: {...}}      on top of the above for scripts/pretrain.py
    finetune: {...}                                      and for scripts/finetune.py

A section's keys win over the same keys outside sections.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from revelio.config import read_yaml, structure

T = TypeVar("T")

SECTIONS = ("pretrain", "finetune")
# What launchers put in front of a script's own words.
LAUNCHERS = ("--local_rank=", "--local-rank=")


def read_section(path: Path, section: str, cls: type[T]) -> T:
    """The config of one script out of a file for several.

    Args:
        path: the YAML file.
        section: whose keys are laid on top of those outside sections.
        cls: the script's config; keys outside sections that it lacks are for other scripts.

    Raises:
        ValueError: a key is unknown to every script, or a value is wrong; the message names the file.
    """
    try:
        values = read_yaml(path)
        parts = {name: values.pop(name, {}) for name in SECTIONS}
        for name, part in parts.items():
            if not isinstance(part, Mapping):
                raise ValueError(f"`{name}` must hold `key: value` lines, not {part!r}")
        merged = {**values, **parts[section]}
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        # A key that another script knows is passed over; one that none knows is refused with a hint.
        kept = {key: merged[key] for key in merged if key in known or key not in _known_keys()}
        return structure(cls, kept)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _known_keys() -> set[str]:
    from llava_ext.options import CacheConfig, FinetuneConfig, PretrainConfig

    known = (fields(cls) for cls in (PretrainConfig, FinetuneConfig, CacheConfig))
    return {field.name for some in known for field in some}


def main(cls: type[T], run: Callable[[T], None], page: str, section: str = "") -> None:
    """A script: parse ``sys.argv``, run; exit 2 with one line on a user's mistake, 130 on Ctrl-C.

    Args:
        cls: the script's config.
        run: what the script does.
        page: the script's docstring, its help page.
        section: of the config file; "" for a script that takes `--section NAME`.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        run(parse(cls, sys.argv[1:], page, section))
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; what was written is whole, --resume continues\n")
        sys.exit(130)
    except (ValueError, KeyError, OSError) as error:
        if os.environ.get("REVELIO_DEBUG"):
            raise
        # str() of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        name = Path(sys.argv[0]).name
        sys.stderr.write(f"{name}: {' '.join(str(message).split())}\n")
        sys.exit(2)


def parse(cls: type[T], words: Sequence[str], page: str, section: str = "") -> T:
    """Defaults, then the file of ``--config``, then flags.

    Raises:
        ValueError: the file is wrong.
        SystemExit: after help, or after a wrong flag (status 2).
    """
    import tyro

    words = [word for word in words if not word.startswith(LAUNCHERS)]
    path, words = _take(words, "--config")
    name, words = _take(words, "--section") if not section else (section, words)
    if name is not None and name not in SECTIONS:
        raise ValueError(f"--section is {name!r}: choose from {', '.join(SECTIONS)}")
    default: Any = cls()
    if path is not None:
        default = read_section(Path(path), name or SECTIONS[0], cls)
    more = "" if section else "\n--section says whose data of the file (default: pretrain)."
    return tyro.cli(
        cls,
        args=words,
        default=default,
        description=f"{page}\n--config FILE fills any of these from a YAML file first.{more}",
    )


def _take(words: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """Split ``flag VALUE`` or ``flag=VALUE`` off."""
    value, rest, left = None, [], list(words)
    while left:
        word = left.pop(0)
        if word == flag:
            if not left:
                raise ValueError(f"{flag} needs a value")
            value = left.pop(0)
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
        else:
            rest.append(word)
    return value, rest
