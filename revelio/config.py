"""Configs: frozen dataclasses filled from a YAML file, then overridden by flags.

Strict: an unknown key is an error that names it and what is allowed. Configs hold plain values and stop at
the command line: commands turn them into arguments.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import cattrs
from cattrs.strategies import configure_union_passthrough

from revelio.trust import kind_of, parse_yaml, printable, read_text
from revelio.wording import did_you_mean

T = TypeVar("T")

CONFIG_LIMIT = 1 << 20

_converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=False)
# Values of a `float | str | None` stay as YAML read them; anything else of another type is refused.
configure_union_passthrough(str | bool | int | float | None, _converter)


def _strict(kind: type) -> Any:
    def structure(value: Any, _: type) -> Any:
        # YAML reads 1e-4 (no dot) as text and 1 as an int: both are honest floats. true is no number.
        if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
            return float(value)
        if type(value) is not kind:
            raise ValueError(f"{value!r} is not {kind.__name__}")
        return value

    return structure


for _kind in (bool, int, float, str):
    _converter.register_structure_hook(_kind, _strict(_kind))


def _path(value: Any, _: type) -> Path:
    # Path("") would be the working folder.
    if not isinstance(value, str | Path) or value == "" or "\0" in str(value):
        raise ValueError(f"{value!r} is no path")
    return Path(value)


_converter.register_structure_hook(Path, _path)
_converter.register_unstructure_hook(Path, str)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        ValueError: it is not there, is no YAML, or holds something else than a mapping.
    """
    if not path.exists():
        raise ValueError(f"no config file at {printable(path)}")
    values = parse_yaml(read_text(path, limit=CONFIG_LIMIT), printable(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{printable(path)} must hold `key: value` lines, not a {kind_of(values)}")
    return values


def structure(
    cls: type[T], values: Mapping[str, Any], missing: Any = MISSING, where: str = ""
) -> T:
    """Build the dataclass ``cls`` from plain values, strictly.

    Args:
        cls: a dataclass, whose fields may be dataclasses themselves.
        values: plain values by field name.
        missing: stands for required fields that ``values`` lacks; without it they are an error.
        where: the dotted path of ``cls`` inside the whole config, for messages.

    Raises:
        ValueError: a key is unknown, a value has the wrong type, or a required one is missing.
    """
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            new = renamed(cls).get(str(key).replace("_", "-"), "").replace("-", "_")
            if new:
                raise ValueError(f"`{where}{key}` is called `{where}{new}` now")
            hint = did_you_mean(str(key), names, "`{}`")
            key = printable(key)
            raise ValueError(f"unknown key `{where}{key}`: {hint}allowed are {', '.join(names)}")
    hints = _hints(cls)
    arguments: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        key, kind = field.name, hints[field.name]
        required = field.default is MISSING and field.default_factory is MISSING
        if is_dataclass(kind) and (key in values or required):
            inner = {} if values.get(key) is None else values[key]
            if not isinstance(inner, Mapping):
                raise ValueError(f"`{where}{key}` must hold `key: value` lines, not {inner!r}")
            arguments[key] = structure(kind, inner, missing, f"{where}{key}.")  # type: ignore[arg-type]
        elif key in values:
            arguments[key] = _value(values[key], kind, f"{where}{key}")
        elif required:
            if missing is MISSING:
                raise ValueError(f"`{where}{key}` is required")
            arguments[key] = missing
    return cls(**arguments)


@cache
def _hints(cls: type) -> Mapping[str, Any]:
    """The types of a class's fields, whose text is evaluated once: a processor asks at every picture."""
    return get_type_hints(cls)


def renamed(cls: type) -> dict[str, str]:
    """The old names of a config's settings and what they are called now, as flags have them.

    A config lists them in a class variable ``renamed``; an old name is refused by a line with the new one.
    """
    return {k: v for base in cls.__mro__ for k, v in vars(base).get("renamed", {}).items()}


def _value(value: Any, kind: Any, where: str) -> Any:
    try:
        if isinstance(value, str) and kind == tuple[Path, ...]:
            value = [value]  # before there could be several
        if isinstance(value, str | Mapping) and get_origin(kind) in (tuple, list):
            raise ValueError("a text or a mapping is no list, though it can be iterated")
        return _converter.structure(value, kind)
    except Exception as error:
        wanted = getattr(kind, "__name__", None) if isinstance(kind, type) else None
        wanted = wanted or str(kind).replace("typing.", "").replace("pathlib.", "")
        raise ValueError(f"`{where}` is {value!r}, which is not {wanted}") from error


def load_config(cls: type[T], path: Path, overrides: Mapping[str, Any] | None = None) -> T:
    """Read ``path`` (YAML) into the dataclass ``cls``; top-level ``overrides`` win."""
    try:
        return structure(cls, {**read_yaml(path), **(overrides or {})})
    except ValueError as error:
        raise ValueError(named(path, error)) from error


def named(path: Path, error: ValueError) -> str:
    """The error's message, which names the file once."""
    message, name = str(error), printable(path)
    return message if name in message else f"{name}: {message}"


def to_plain(config: Any) -> dict[str, Any]:
    """The config as plain values, fit for YAML and JSON."""
    return _plain(_converter.unstructure(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value


def to_yaml(config: Any) -> str:
    """The config as the YAML text that ``load_config`` reads back to an equal one."""
    import yaml

    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def completed(config: Any) -> Callable[[str], str]:
    """How the YAML text of an older version's config of the same kind looks today.

    Settings that it lacks, because they were added since, get their defaults: a default must therefore be
    what the program did before it had the setting. Those that were renamed since have their new names.

    Returns:
        A function of the text; a ValueError says that it holds what is unknown now, or lacks what is
        required.
    """
    names = {field.name for field in fields(config)}
    pairs = renamed(type(config)).items()
    now = {old.replace("-", "_"): new.replace("-", "_") for old, new in pairs}

    def fill_up(text: str) -> str:
        values = parse_yaml(text, "config.yaml")
        if not isinstance(values, Mapping):
            raise ValueError(f"config.yaml holds a {kind_of(values)}")
        values = {key if key in names else now.get(key, key): values[key] for key in values}
        return to_yaml(structure(type(config), values))

    return fill_up
