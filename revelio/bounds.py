"""What a setting may be, declared once where the setting is: ``k: Count = 32``.

A config's fields carry their bounds in their types; :func:`check` walks a config and refuses the first value
outside them in one line: what was given, what is allowed. Whatever a field declares, numbers are finite and
fit 64 bits, texts and paths are not empty and hold no NUL.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from revelio.trust import printable

T = TypeVar("T")

WHOLE_LIMIT = 2**63


class Bound(Protocol):
    """What one field's values must be."""

    def refuses(self, value: Any) -> str | None:
        """What is allowed instead of ``value``; None where it may stand."""
        ...


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; ``above`` and ``below`` leave the ends themselves out."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def refuses(self, value: Any) -> str | None:
        """See :class:`Bound`."""
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        if low and high:
            return None
        start = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        if self.high == math.inf:
            return f"give {start}"
        end = f"less than {self.high:g}" if self.below else f"at most {self.high:g}"
        return f"give {start} and {end}"


@dataclass(frozen=True)
class Place:
    """Paths of a file, a folder or either, which is there already or may be made."""

    kind: Literal["file", "folder", "file or folder"]
    exists: bool = False

    def refuses(self, value: Path) -> str | None:
        """See :class:`Bound`."""
        try:
            if self.kind == "folder" and value.exists() and not value.is_dir():
                return "it is no folder, give one"
            if self.kind == "file" and value.is_dir():
                return "it is a folder, give a file"
            if self.exists:
                return None if value.exists() else f"there is no such {self.kind}"
            above = next(parent for parent in value.absolute().parents if parent.exists())
            return None if above.is_dir() else f"{above} is no folder"
        except OSError as error:
            return f"it cannot be used ({error.strerror})"


@dataclass(frozen=True)
class Pictures:
    """Paths of folders whose pictures are all read: results there would be taken for some of them."""

    def refuses(self, value: Any) -> str | None:
        """See :class:`Bound`."""
        return None

    def taken(self, value: Any, out: Path) -> str | None:
        """The folder in whose way the output folder ``out`` would be; None where it is in none's."""
        folder, place = os.path.realpath(value), os.path.realpath(out)
        inside = place.startswith(folder.rstrip(os.sep) + os.sep)
        return str(Path(value)) if os.path.isdir(folder) and (place == folder or inside) else None


@dataclass(frozen=True)
class Form:
    """Texts that match a pattern."""

    pattern: str
    allowed: str

    def refuses(self, value: str) -> str | None:
        """See :class:`Bound`."""
        return None if re.fullmatch(self.pattern, value) else f"give {self.allowed}"


@dataclass(frozen=True)
class MayBeEmpty:
    """Texts that may be empty."""

    def refuses(self, value: str) -> str | None:
        """See :class:`Bound`."""
        return None


@dataclass(frozen=True)
class NotEmpty:
    """Lists of at least one value."""

    def refuses(self, value: Any) -> str | None:
        """See :class:`Bound`."""
        return None if len(value) else "give one or more"


class PathFields:
    """What configs inherit so that their paths may be given as text, one alone where several may stand.

    A text that names a model or a data set may be a path likewise.
    """

    def __post_init__(self) -> None:
        """Make of every such value what its field declares; anything else is left to :func:`check`."""
        for name, kind in _path_kinds(type(self)).items():
            object.__setattr__(self, name, _converted(kind, getattr(self, name)))


@cache
def _path_kinds(cls: type) -> dict[str, Any]:
    """The fields that hold a path, several, or a text, and which of them."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        held = [kind for kind in kinds if kind in (Path, str, tuple[Path, ...], tuple[str, ...])]
        if len(held) == 1:
            found[name] = held[0]
    return found


def _converted(kind: Any, value: Any) -> Any:
    if kind is str:
        return str(value) if isinstance(value, Path) else value
    if kind is Path:  # Path("") would be the working folder
        return Path(value) if isinstance(value, str) and value else value
    if isinstance(value, str | Path):
        value = (value,)
    whole = isinstance(value, list | tuple)
    return tuple(_converted(get_args(kind)[0], one) for one in value) if whole else value


Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Seed = Annotated[int, Range(-(2**62), 2**62)]
Pixels = Annotated[int, Range(1, 32_768)]
Workers = Annotated[int, Range(0, 1024)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, below=True)]
OpenShare = Annotated[float, Range(0, 1, above=True, below=True)]
# Adam moves a weight by about this much a step: beyond 1 nothing learns.
LearningRate = Annotated[float, Range(0, 1, above=True)]
Folder = Annotated[Path, Place("folder", exists=True)]
File = Annotated[Path, Place("file", exists=True)]
Existing = Annotated[Path, Place("file or folder", exists=True)]
OutFolder = Annotated[Path, Place("folder")]
OutFile = Annotated[Path, Place("file")]
AnyText = Annotated[str, MayBeEmpty()]
Device = Annotated[str, Form(r"auto|[a-z]+(:\d+)?", "auto, cpu, cuda, cuda:1 or mps")]
Dtype = Annotated[str, Form("float32|bfloat16|float16", "float32, bfloat16 or float16")]


@dataclass(frozen=True)
class Setting:
    """One value of a config.

    Attributes:
        path: the names that lead to it, outermost first.
        kind: its type, with the bounds.
        value: what it is.
    """

    path: tuple[str, ...]
    kind: Any
    value: Any

    @property
    def flag(self) -> str:
        """What the command line calls it; what stands without a flag is in capitals, as on help pages."""
        from tyro.conf import Positional

        if Positional in getattr(self.kind, "__metadata__", ()):
            return self.path[-1].replace("_", "-").upper()
        return "--" + ".".join(self.path).replace("_", "-")


def check(config: Any) -> None:
    """Refuse a config with a value outside its field's bounds.

    Raises:
        ValueError: one line on the first such value, under its flag.
    """
    for setting, value, reason in _all_refused(config):
        raise ValueError(f"{setting.flag} is {value}: {reason}")


def check_fields(config: Any) -> None:
    """What :func:`check` does, with a value named as the field that it is, for library calls.

    Raises:
        ValueError: one line on the first value outside its bounds.
    """
    for setting, value, reason in _all_refused(config):
        raise ValueError(f"{'.'.join(setting.path)}={value}: {reason}")


def _all_refused(config: Any) -> Iterator[tuple[Setting, str, str]]:
    """The settings outside their bounds, with the value as it is shown and what is allowed."""
    for setting in settings(config):
        found = _refused(setting.kind, setting.value)
        if found is not None:
            value, reason = found
            yield setting, printable(str(value) if isinstance(value, Path) else repr(value)), reason
    yield from _among_pictures(config)


def _among_pictures(config: Any) -> Iterator[tuple[Setting, str, str]]:
    """The output folders that lie among pictures which other settings read."""
    found = [(one, list(_bounds(one.kind, one.value))) for one in settings(config)]
    read = [(bound, value) for _, bounds in found for bound, value in bounds
            if isinstance(bound, Pictures)]  # fmt: skip
    for one, bounds in found:
        places = [out for bound, out in bounds if bound == Place("folder")]
        if not places or any(isinstance(bound, Pictures) for bound, _ in bounds):
            continue
        folder = next((at for bound, value in read if (at := bound.taken(value, places[0]))), None)
        if folder is not None:
            why = f"it lies among the pictures of {printable(folder)}: choose a folder outside"
            yield one, printable(str(places[0])), why


def settings(config: Any, above: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every value of a config, of the dataclasses inside it, and of lists of them."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value, path = getattr(config, field.name), (*above, field.name)
        if is_dataclass(value):
            yield from settings(value, path)
            continue
        yield Setting(path, hints[field.name], value)
        if isinstance(value, tuple):
            for number, inner in enumerate(value):
                if is_dataclass(inner):
                    yield from settings(inner, (*path, str(number)))


def shared(config: Any, cls: type) -> dict[str, Any]:
    """The values of the settings that the dataclass ``cls`` declares, too, by name."""
    own = {field.name for field in fields(config)}
    return {one.name: getattr(config, one.name) for one in fields(cls) if one.name in own}


def derived(config: Any, cls: type[T], **own: Any) -> T:
    """A config ``cls`` of the settings that it shares with ``config``, and of its own, which win."""
    return cls(**(shared(config, cls) | own))


def _refused(kind: Any, value: Any) -> tuple[Any, str] | None:
    """What is wrong, the value or one inside it, and what is allowed; None where nothing is."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [bound for bound in arguments[1:] if hasattr(bound, "refuses")]
        empty = value == "" and any(isinstance(bound, MayBeEmpty) for bound in bounds)
        found = None if empty else _refused(arguments[0], value)
        return found or next(((value, why) for b in bounds if (why := b.refuses(value))), None)
    if origin in (Union, UnionType):
        chosen = next((one for one in arguments if _belongs(value, one)), None)
        literals = [one for one in arguments if get_origin(one) is Literal]
        return _refused(chosen or (literals or arguments)[0], value)
    if origin is Literal and value not in arguments:
        return value, f"choose from {', '.join(map(str, arguments))}"
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return value, "give a list"
        return next((found for one in value if (found := _refused(arguments[0], one))), None)
    if (allowed := _KINDS.get(kind)) and not _is_a(value, allowed[0]):
        return value, f"give {allowed[1]}"
    reason = _plain_refusal(value)
    return None if reason is None else (value, reason)


def _bounds(kind: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """The bounds that a type declares, each with the value, or one inside it, that it is for."""
    origin, arguments = get_origin(kind), get_args(kind)
    if value is None:
        return
    if origin is Annotated:
        yield from ((bound, value) for bound in arguments[1:] if hasattr(bound, "refuses"))
        yield from _bounds(arguments[0], value)
    elif origin in (Union, UnionType):
        yield from _bounds(next((one for one in arguments if _belongs(value, one)), None), value)
    elif origin is tuple and isinstance(value, tuple):
        for one in value:
            yield from _bounds(arguments[0], one)


def _belongs(value: Any, kind: Any) -> bool:
    """Whether the value is of this alternative of a union."""
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(plain) is Literal:
        return value in get_args(plain)
    if plain is int and isinstance(value, bool):
        return False
    return isinstance(value, get_origin(plain) or plain)


# What a value of a plain type may be; numpy's numbers are such, too.
_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    Path: (Path, "a path"),
}


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _plain_refusal(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "give a finite number"
    if type(value) is int and not -WHOLE_LIMIT < value < WHOLE_LIMIT:
        return "give a number that fits 64 bits"
    if value == "":
        return "it is empty, give a value or leave it out"
    if isinstance(value, str | Path) and "\0" in str(value):
        return "it holds a NUL character"
    return None
