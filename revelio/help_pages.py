"""Help pages that fit a screen: a config lists what is set most often, `--help-all` explains the rest.

A config's class variable ``first`` names those settings, for its own class and not for those that inherit it:
the settings of a k-SAE are all there is to `train-ksae`, and a side of `demo`. Without it all are shown.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

if TYPE_CHECKING:
    from tyro.constructors import StructConstructorSpec, StructTypeInfo

SHORT = ("-h", "--help")
ALL = "--help-all"


def shown_first(cls: Any) -> tuple[str, ...]:
    """The settings of a config that its short help page shows; empty: all."""
    return vars(cls).get("first", ()) if isinstance(cls, type) else ()


def has_more(cls: type) -> bool:
    """Whether the short help page of a config leaves anything out, of its own or of those inside it."""
    inside = (kind for kind in get_type_hints(cls).values() if is_dataclass(kind))
    return bool(shown_first(cls)) or any(map(has_more, inside))  # type: ignore[arg-type]


@contextmanager
def first_settings() -> Iterator[None]:
    """Help pages that tyro prints meanwhile leave out what no config lists."""
    from tyro.conf import Suppress
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec

    registry, looking = ConstructorRegistry(), False

    @registry.struct_rule
    def _(info: "StructTypeInfo") -> "StructConstructorSpec | None":
        nonlocal looking
        first = shown_first(info.type)
        if looking or not first:
            return None
        looking = True  # The rule is asked again for what it shortens.
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            looking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        return replace(
            spec,
            fields=tuple(
                one if one.name in first else replace(one, type=Annotated[one.type, Suppress])
                for one in spec.fields
            ),
        )

    with registry:
        yield
