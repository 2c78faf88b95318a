"""The command lines of ``llava_ext``: one YAML for both stages, flags on top, errors as one line.

    model: {...}           for every command
    cache: ...
    pretrain: {data: {...}, out: ..., stage: {...}}      on top of the above for `revelio llava pretrain`
    finetune: {...}                                      and for `revelio llava finetune`

A section's keys win over the same keys outside sections.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from revelio import command_line
from revelio.command_line import own_words, parse_flags, take
from revelio.config import named, read_yaml, structure
from revelio.distributed import is_main
from revelio.following import following

T = TypeVar("T")

SECTIONS = ("pretrain", "finetune")


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
            if part is None:
                parts[name] = {}
            elif not isinstance(part, Mapping):
                raise ValueError(f"`{name}` must hold `key: value` lines, not {part!r}")
        merged = {**values, **parts[section]}
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        # A key that another script knows is passed over; one that none knows is refused with a hint.
        kept = {key: merged[key] for key in merged if key in known or key not in _known_keys()}
        return structure(cls, kept)
    except ValueError as error:
        raise ValueError(named(path, error)) from error


def _known_keys() -> set[str]:
    from llava_ext.config import CacheConfig, FinetuneConfig, PretrainConfig

    known = (fields(cls) for cls in (PretrainConfig, FinetuneConfig, CacheConfig))
    return {field.name for some in known for field in some}


def run_module(module: ModuleType, words: Sequence[str], *, name: str, prog: str) -> None:
    """Parse ``words`` for a command, run it and name the next.

    A user's mistake ends with one line and status 2, Ctrl-C with 130.

    Args:
        module: a command: its docstring is the help page, its ``Config`` the flags. A command that reads
            files for several commands has ``SECTION``: the section it takes, "" to have `--section NAME`;
            and ``CARRIES``: how those flags begin that the next command is given as they were.
        words: the flags.
        name: what errors begin with.
        prog: how the command is called, for its help.
    """
    if not hasattr(module, "SECTION"):
        command_line.run_module(module, words, name=name, prog=prog)
        return
    stopped = f"{name}: {command_line.stopped_line(module.Config)}"
    with command_line.one_line_errors(name, stopped, command_line.flags_of(module.Config)):
        config = parse(module.Config, words, module.__doc__ or "", module.SECTION, prog)
        module.run(config)
        # Launchers start several processes; one of them speaks.
        if is_main():
            path, flags = take(own_words(words), "--config")
            section, flags = take(flags, "--section")
            given = [*(["--config", path] if path else []), *carried(flags, module.CARRIES)]
            read = module.SECTION or section or SECTIONS[0]
            sys.stdout.write(f"{following(*module.following(config, given, read))}\n")


def carried(words: Sequence[str], beginnings: tuple[str, ...]) -> list[str]:
    """Those flags, each with its values, whose names begin so: what the next command must be given, too."""
    kept: list[str] = []
    keeps = False
    for word in words:
        if word.startswith("--"):
            keeps = word.replace("_", "-").startswith(beginnings)
        kept += [word] if keeps else []
    return kept


def parse(
    cls: type[T], words: Sequence[str], page: str, section: str = "", prog: str | None = None
) -> T:
    """Defaults, then the file of ``--config``, then flags.

    Raises:
        ValueError: the file or a flag is wrong.
        SystemExit: after help.
    """
    path, words = take(own_words(words), "--config")
    name, words = take(words, "--section") if not section else (section, words)
    if name is not None and name not in SECTIONS:
        raise ValueError(f"--section is {name!r}: choose from {', '.join(SECTIONS)}")
    default: Any = cls()
    if path is not None:
        default = read_section(Path(path), name or SECTIONS[0], cls)
    more = "" if section else "\n--section says whose data of the file (default: pretrain)."
    page = f"{page}\n--config FILE fills any of these from a YAML file first.{more}"
    return parse_flags(cls, words, default, page, prog)
