"""A column of labels as classes and class ids."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from revelio.trust import printable
from revelio.wording import plural


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


def one_each(values: Sequence[Any], where: str, remedy: str = "") -> list[Any]:
    """Labels out of the lists that sets with several an image keep them in; others as they are.

    Raises:
        ValueError: a list holds none, or different ones.
    """
    lists = [value for value in values if isinstance(value, list | tuple)]
    if not lists or any(isinstance(one, list | Mapping) for held in lists for one in held):
        return list(values)
    alone = (value if isinstance(value, list | tuple) else (value,) for value in values)
    held = [[one for one in some if one is not None] for some in alone]
    # A name may be there once an object; equal numbers may be flags, one a class.
    held = [list(dict.fromkeys(some)) if _are_names(some) else some for some in held]
    if not any(held):
        return [None] * len(held)
    odd = next((row for row, labels in enumerate(held) if len(labels) != 1), None)
    if odd is None:
        return [label for [label] in held]
    some = [*map(str, held[odd][:3]), *(["..."] if len(held[odd]) > 3 else [])]
    shown = f" ({printable(', '.join(some))})" if some else ""
    raise ValueError(
        f"{where} holds lists, and row {odd} has {plural(len(held[odd]), 'label')}{shown}, where a picture "
        f"has one class{remedy or ': give it one, or choose another label_column'}"
    )


def _are_names(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


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
