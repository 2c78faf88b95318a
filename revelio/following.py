"""What to run next: every command ends with the next one's line, its arguments filled in.

next: revelio train-ksae --store runs/samples/up_ft1-t25-empty-d0 --out runs/samples-ksae
"""

import shlex
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from revelio.trust import printable


def following(*words: object) -> str:
    """The line that names the next command.

    Args:
        words: of the command after `revelio`, quoted where a shell needs it; words in capitals are for the
            user to fill in.
    """
    return printable(f"next: revelio {shlex.join(str(word) for word in words)}")


def beside(path: Path, what: str) -> Path:
    """A name beside a finished output for what is made of it: ``runs/pets`` -> ``runs/pets-ksae``."""
    return path.with_name(f"{path.name}-{what}") if path.name else Path(what)


def flags(options: Any, prefix: str, *names: str) -> Iterator[str]:
    """The flags of those options that are not their defaults.

    Args:
        options: a dataclass.
        prefix: what the command calls it: `data`, `backbone`; "" where it is the command's whole config.
        names: the fields to look at; none: all.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        made = None if field.default_factory is MISSING else field.default_factory()
        default = made if field.default is MISSING else field.default
        if value != default and (not names or field.name in names):
            above = f"{prefix}." if prefix else ""
            no = "no-" if value is False else ""
            yield f"--{above}{no}{field.name}".replace("_", "-")
            if not isinstance(value, bool):
                yield from map(str, value if isinstance(value, tuple) else (value,))
