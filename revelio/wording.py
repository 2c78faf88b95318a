"""How messages are worded: counted nouns, and what a mistyped name may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches

# difflib's share of common characters from which a name is near another.
NEAR = 0.65
# What other programs call a flag: nothing in its letters leads to ours.
SYNONYMS = {
    "model": "backbone.name",
    "dataset": "data.source",
    "images": "data.source",
    "output": "out",
    "lr": "learning-rate",
}


def plural(count: float, noun: str, more: str = "", form: str = ",") -> str:
    """A counted noun: `1 store`, `2,500 stores`.

    Args:
        count: how many.
        noun: one of them.
        more: several of them, where that is not the noun and an s.
        form: how the number is shown; the noun follows what is shown.
    """
    shown = format(count, form)
    return f"{shown} {noun if shown == '1' else more or noun + 's'}"


def did_you_mean(given: str, known: Iterable[str], quoted: str = "{}") -> str:
    """The question that a message about an unknown name asks, with a space behind it; "" where none is near.

    Args:
        given: what is unknown.
        known: the names that there are.
        quoted: how a name is shown.
    """
    near = get_close_matches(given, list(known), n=1, cutoff=NEAR)
    return f"did you mean {quoted.format(near[0])}? " if near else ""


def meant_flag(given: str, known: Iterable[str]) -> str:
    """The question that a message about an unknown flag asks: `--source` may be `--data.source`."""
    word, names = given.strip("-"), sorted(known)
    inside = [one for one in names if one.rpartition(".")[2] == word]
    inside = inside or [one for one in names if one.strip("-") == SYNONYMS.get(word)]
    if inside:
        return f"did you mean {' or '.join(inside)}? "
    return did_you_mean(word, (one.strip("-") for one in names), "--{}")
