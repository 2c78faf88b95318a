"""Pages from templates: whatever a report holds, names of files and classes too, is shown as text."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined


def render_page(
    package: str,
    template: str,
    values: Mapping[str, Any],
    *,
    folder: str = "templates",
    strict: bool = False,
) -> str:
    """Render a template of a package; every value is escaped.

    Args:
        package: the package that the template comes with.
        template: its file.
        values: by the names that the template has for them.
        folder: where in the package it lies.
        strict: a name that is not among the values is an error, not empty.
    """
    environment = Environment(
        loader=PackageLoader(package, folder),
        autoescape=True,
        undefined=StrictUndefined if strict else Undefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
