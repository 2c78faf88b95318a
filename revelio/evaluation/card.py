"""A k-SAE's evaluation in its model card: a section of its own, between two marks."""

import re
from collections.abc import Mapping
from typing import Any

from revelio.evaluation.page import rows
from revelio.trust import printable

START, END = "<!-- revelio eval-ksae -->", "<!-- /revelio eval-ksae -->"


def section(result: Mapping[str, Any], ksae: str) -> str:
    """The measures of one k-SAE of an evaluation, each with its strongest control and the verdict."""
    lines = [
        START,
        "## Beside what learned nothing",
        "",
        f"{result['images']:,} held-out images of {printable(result['store'])}. Intervals of differences: "
        f"{result['interval_method']}.",
        "",
        *rows(result["ksaes"][ksae]["measures"]),
    ]
    notes = [f"- {note}" for note in result["notes"]]
    return "\n".join([*lines, *(["", *notes] if notes else []), END])


def with_section(card: str, made: str) -> str:
    """A card with this section in the place of an earlier one, or at its end; the rest stays as it is."""
    earlier = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if earlier.search(card):
        return earlier.sub(lambda _: made, card, count=1)
    return f"{card.rstrip()}\n\n{made}\n"
