"""docs/flags.md: every flag of every command with its help, made from the configs that declare them."""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from revelio.cli import COMMANDS, GROUPS, find_module
from revelio.config import renamed

HEAD = """# Flags

Made by `python -m tools.render_docs` from the configs; not to be edited. A flag means the same wherever it
appears. Every flag is a key of `--config FILE` (YAML), too: `--sae.batch-size 9` is `sae: {batch_size: 9}`.
"""


@dataclass(frozen=True)
class Flag:
    """One flag of one command.

    Attributes:
        name: with its dashes.
        command: whose it is.
        kind: what it takes: path, number, text or switch.
        help: its help text, on one line.
    """

    name: str
    command: str
    kind: str
    help: str


def all_commands() -> Iterator[tuple[str, type]]:
    """Every command of the wheel with its config."""
    for name in COMMANDS:
        yield name, find_module(name).Config
    for group, package in GROUPS.items():
        module = import_module(package)
        for name in module.COMMANDS:
            yield f"{group} {name}", module.find_module(name).Config


def flags_of(command: str, cls: type, above: str = "") -> Iterator[Flag]:
    """The flags of a config and of those inside it."""
    hints, helps = get_type_hints(cls), _helps(cls)
    for field in fields(cls):
        kind = hints[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from flags_of(command, kind, f"{above}{field.name}.")
        else:
            name = f"--{above}{field.name}".replace("_", "-")
            yield Flag(name, command, kind_of(kind), helps.get(field.name, ""))


def kind_of(hint: Any) -> str:
    """What a flag of this type takes; a number or a word (`auto`) is a number."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "text"
    if origin is not None:
        kinds = {kind_of(one) for one in (inside[:1] if origin is Annotated else inside)}
        return next(kind for kind in ("path", "number", "text", "switch", "") if kind in kinds)
    plain = {bool: "switch", int: "number", float: "number", str: "text", Path: "path"}
    return plain.get(hint, "")


def _helps(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass and of those it inherits, or in its docstring's list."""
    found: dict[str, str] = {}
    for base in (one for one in reversed(cls.__mro__) if is_dataclass(one)):
        listed = re.findall(
            r"^    (\w+): (.*(?:\n      .*)*)", inspect.getdoc(base) or "", re.MULTILINE
        )
        found |= {name: " ".join(text.split()) for name, text in listed}
        (made,) = ast.parse(dedent(inspect.getsource(base))).body
        assert isinstance(made, ast.ClassDef)
        for field, text in pairwise(made.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def flags_page() -> str:
    """The page."""
    flags = [flag for name, cls in all_commands() for flag in flags_of(name, cls)]
    meanings: dict[tuple[str, str], list[str]] = {}
    for flag in flags:
        meanings.setdefault((flag.name, flag.help), []).append(flag.command)
    rows = [
        f"| `{name}` | {text.replace('|', chr(92) + '|')} | {', '.join(commands)} |"
        for (name, text), commands in sorted(meanings.items())
    ]
    old = [
        f"| {name} | `--{before}` | `--{now}` |"
        for name, cls in all_commands()
        for before, now in renamed(cls).items()
    ]
    table = ["| flag | what it is | commands |", "|---|---|---|", *rows]
    names = ["| command | before | now |", "|---|---|---|", *old]
    text = "\n".join(
        [*table, "", "## Old names", "", "Refused by a line with the new one.", "", *names]
    )
    return f"{HEAD}\n{text}\n"
