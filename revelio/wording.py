"""How messages are worded: counted nouns, and what a mistyped name may have meant."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

# difflib's share of common characters from which a name is near another.
NEAR = 0.65


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
        return f"{flag} takes no value, and {word} follows it: give {flag} or --no-{flag[2:]}"
    grid = f"--grid.{flag[2:]}"
    several = f"{grid} takes several, and combines them" if grid in flags else "give one"
    return f"{flag} takes one value, and {word} is one more: {several}"
