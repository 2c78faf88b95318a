"""A column of labels as classes and class ids."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def class_ids(
    values: Sequence[Any], present: Collection[Any], where: str, remedy: str = ""
) -> tuple[tuple[str, ...], list[int] | None]:
    """Classes and class ids; both empty where no row has a label (None, or -1 as the hub writes).

    Args:
        values: one a row: names, or whole numbers from 0.
        present: the values of all splits, so that a class missing from one doesn't shift the ids of others.
        where: what holds them, for messages.
        remedy: what to do, for messages.

    Raises:
        ValueError: some rows have a label and some have none, or they are no classes.
    """
    missing = [index for index, value in enumerate(values) if value is None or value == -1]
    if len(missing) == len(values):
        return (), None
    if missing:
        raise ValueError(f"{where}: row {missing[0]} has no label but others do: label or drop it")
    odd = next((value for value in values if not isinstance(value, str | int)), None)
    if odd is None:
        known = set(present) - {None, -1}
        kinds = {type(value) for value in known}
        if kinds == {str}:
            return _numbered(values, sorted(known))
        if kinds <= {int, bool} and min(known) >= 0:
            # The ids that occur, not all below the largest: WordNet's and iNaturalist's go to many millions.
            return _numbered([int(value) for value in values], sorted(set(map(int, known))))
    held = "" if odd is None else f"{kind_of_values(odd)}, "
    raise ValueError(f"{where} holds {held}no classes (names, or whole numbers from 0){remedy}")


def kind_of_values(value: Any) -> str:
    """What a value and its fellows are, in people's words."""
    if isinstance(value, list | tuple):
        return "lists"
    return "records" if isinstance(value, Mapping) else f"values of type {type(value).__name__}"


def _numbered(
    values: Sequence[Any], classes: Sequence[Any]
) -> tuple[tuple[str, ...], list[int] | None]:
    places = {value: place for place, value in enumerate(classes)}
    return tuple(map(str, classes)), [places[value] for value in values]
