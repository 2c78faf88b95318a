"""Models in the form of the Hugging Face hub, written as all other files are.

The hub's own ``save_pretrained`` writes in place, first removes ``config.json``, and makes files that only
their owner can read.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from revelio.files import write_folder
from revelio.trust import printable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CARD = "README.md"
WEIGHTS = "model.safetensors"
FINAL = "final"  # where a run has its model
CARD_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ about }}

| | |
|---|---|
{{ facts }}

```python
{{ usage }}
```
"""
LONGEST = 300  # characters of a value


def is_hub_id(name: str | Path) -> bool:
    """Whether what is no path here can be a hub id: `owner/name`, whose first part is no folder here.

    What can't be is a path that is missing: it is told at once, not asked for on the hub.
    """
    return bool(HUB_ID.fullmatch(str(name))) and not Path(name).parent.is_dir()


def trained(where: str | Path) -> str | Path:
    """The folder that holds a trained model: the `final` folder of a run; else what was given."""
    final = Path(where) / FINAL
    return final if (final / WEIGHTS).is_file() and not (Path(where) / WEIGHTS).is_file() else where


def card_facts(values: Mapping[str, Any]) -> str:
    """A model's numbers and settings as rows of a Markdown table; what is None or empty is left out."""
    return "\n".join(f"| {name} | {value} |" for name, value in _facts(values, ""))


def _facts(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{above}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _facts(value, f"{name}: ")
        elif value is not None and value not in ([], (), ""):
            several = value if isinstance(value, list | tuple) else [value]
            shown = (f"{one:.4g}" if isinstance(one, float) else str(one) for one in several)
            yield _cell(name), _cell(", ".join(shown))


def _cell(text: str) -> str:
    text = printable(text)
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    return text.replace("|", "\\|").replace("<", "&lt;")


def save_whole(
    save: Callable[..., str | None], folder: Any, keywords: dict[str, Any]
) -> str | None:
    """Call the hub's ``save_pretrained`` so that each file is whole or not there, with the umask's mode.

    Args:
        save: the hub's method, of one model.
        folder: where the model is to be.
        keywords: as ``save`` takes them; a push goes to the repository called like the folder, unless
            ``repo_id`` names one.

    Returns:
        What ``save`` gives: the commit's address after a push, else None.

    Raises:
        ValueError: a file stands at ``folder``, or a folder in place of one of the files.
        OSError: it can't be written.
    """
    path = Path(folder)
    if keywords.get("push_to_hub") and keywords.get("repo_id") is None:
        keywords = keywords | {"repo_id": path.name}
    answers: list[str | None] = []

    def fill(made: Path) -> None:
        answers.append(save(made, **keywords))
        if (path / CARD).exists():  # which the user may have written
            (made / CARD).unlink(missing_ok=True)

    write_folder(path, fill)
    return answers[0]
