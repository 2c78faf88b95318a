"""Help pages that fit a screen: a config lists what is set most often, `--help-all` explains the rest.

A config's class variable ``first`` names those settings, for its own class and not for those that inherit it:
the settings of a k-SAE are all there is to `train-ksae`, and a side of `demo`. Without it all are shown.
A paragraph is wrapped as the screen has it, wherever its source breaks lines.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

if TYPE_CHECKING:
    from tyro.constructors import StructConstructorSpec, StructFieldSpec, StructTypeInfo

SHORT = ("-h", "--help")
ALL = "--help-all"


def shown_first(cls: Any) -> tuple[str, ...]:
    """The settings of a config that its short help page shows; empty: all."""
    return vars(cls).get("first", ()) if isinstance(cls, type) else ()


def has_more(cls: type) -> bool:
    """Whether the short help page of a config leaves anything out, of its own or of those inside it."""
    inside = (kind for kind in get_type_hints(cls).values() if is_dataclass(kind))
    return bool(shown_first(cls)) or any(map(has_more, inside))  # type: ignore[arg-type]


def stray(words: Sequence[str], word: str, flags: Collection[str]) -> str:
    """What to say of a word that belongs to no flag: mostly one value more than the flag before it takes.

    Args:
        words: a command line.
        word: the one of them that nothing takes.
        flags: those that there are, with their dashes.
    """
    places = [place for place, one in enumerate(words) if one == word]
    # A flag's own value is no stray one, even where both are the same.
    after = [p for p in places if p and (not words[p - 1].startswith("--") or "=" in words[p - 1])]
    place = (after or places or [0])[0]
    flag = next((one for one in reversed(words[:place]) if one.startswith("--")), "")
    flag = flag.partition("=")[0].replace("_", "-")
    if flag not in flags:
        return f"{word} belongs to no flag: --help lists them"
    if f"--no-{flag[2:]}" in flags:
        return f"{flag} takes no value, but is given {word}: use {flag} or --no-{flag[2:]}"
    grid = f"--grid.{flag[2:]}"
    several = f"{grid} takes several, and combines them" if grid in flags else "give one"
    return f"{flag} takes one value, and {word} is one more: {several}"


def reflowed(text: str) -> str:
    """Paragraphs of a docstring, each on one line; indented lines, such as examples, stay as they are."""
    lines: list[str] = []
    for line in text.splitlines():
        joins = line.strip() and lines and lines[-1].strip()
        if joins and not line.startswith(" ") and not lines[-1].startswith(" "):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line.rstrip())
    return "\n".join(lines)


def _one_paragraph_each(help: "Callable[[], str | None] | str | None") -> str | None:
    """A setting's help text without its source's line breaks: tyro keeps those before indented lines."""
    text = help() if callable(help) else help
    return text and "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


@contextmanager
def pages(*, short: bool) -> Iterator[None]:
    """Help pages that tyro prints meanwhile are wrapped anew; short ones leave out what no config lists."""
    from tyro.conf import Suppress
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec

    registry, looking = ConstructorRegistry(), False

    @registry.struct_rule
    def _(info: "StructTypeInfo") -> "StructConstructorSpec | None":
        nonlocal looking
        if looking:
            return None
        looking = True  # The rule is asked again for what it changes.
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            looking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        first = shown_first(info.type) if short else ()
        return replace(spec, fields=tuple(_shown(one, first) for one in spec.fields))

    def _shown(one: "StructFieldSpec", first: tuple[str, ...]) -> "StructFieldSpec":
        kind = one.type if not first or one.name in first else Annotated[one.type, Suppress]
        return replace(one, type=kind, helptext=partial(_one_paragraph_each, one.helptext))

    with registry:
        yield
