"""Completion for shells: one parser of all commands and their flags, which tyro writes as a script.

revelio --print-completion bash > ~/.local/share/bash-completion/completions/revelio
revelio --print-completion zsh > ~/.zfunc/_revelio
"""

from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import field, make_dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Union

SHELLS = ("bash", "zsh")


def completion(shell: str, commands: Mapping[str, ModuleType | Mapping[str, ModuleType]]) -> str:
    """The script that completes `revelio` in a shell.

    Args:
        shell: one of :data:`SHELLS`.
        commands: each command's module, or those of a group of commands.

    Raises:
        ValueError: another shell.
    """
    import tyro

    if shell not in SHELLS:
        raise ValueError(f"completion is for {' and '.join(SHELLS)}, not {shell!r}")
    said = StringIO()
    with redirect_stdout(said):
        try:
            words = ["--tyro-print-completion", shell]
            tyro.cli(_parser("revelio", commands), prog="revelio", args=words)
        except SystemExit as stopped:
            if stopped.code:
                raise
    return said.getvalue()


def _parser(name: str, commands: Mapping[str, ModuleType | Mapping[str, ModuleType]]) -> Any:
    """A dataclass whose one field is any of the commands."""
    from tyro.conf import arg, subcommand

    kinds = tuple(
        Annotated[
            _parser(one, inside) if isinstance(inside, Mapping) else _with_config(inside.Config),
            subcommand(one, prefix_name=False),
        ]
        for one, inside in commands.items()
    )
    command = Annotated[Union[kinds], arg(name="")]  # noqa: UP007
    return make_dataclass(name.replace("-", "_"), [("command", command)])


def _with_config(cls: type) -> type:
    """A command's flags and `--config`, which is read before them."""
    config = ("config", Path | None, field(default=None))
    return make_dataclass(cls.__name__, [config], bases=(cls,), frozen=True, kw_only=True)
