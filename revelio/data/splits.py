"""Which split of a source is meant, what splits are called, and splits that keep the classes' shares."""

import re
from collections.abc import Sequence

import torch

from revelio.seeds import generator
from revelio.trust import printable

ALL = "all"
_VALIDATION = ("validation", "valid", "val", "dev")
# What folders and files of splits are called: Train, Training, seg_train, test_set, train2017.
_NAMED = re.compile(
    r"(?:seg[_-])?(?:(train|test)ing|(trainval|train|test|validation|valid|val|dev|evaluation|eval))"
    r"(?:[_-]?(?:set|split|data|images|imgs|\d{4}))?"
)


class NoSplits(ValueError):
    """A split was asked for of images that have none."""


def split_name(name: str) -> str | None:
    """The split that a folder or file of this name holds, in any case; None where it names none."""
    found = _NAMED.fullmatch(name.casefold())
    return None if found is None else found.group(1) or found.group(2)


def choose_split(available: Sequence[str], wanted: str | None, where: str) -> str | None:
    """The split to take: the wanted one, else the training one, else the only one.

    Args:
        available: the source's splits; empty where it has none.
        wanted: a split's name, ``all`` for every split together, or None.
        where: what a message calls the source.

    Returns:
        One of ``available``, or ``all``; None where there are no splits.

    Raises:
        NoSplits: a split was asked for, and there are none at all.
        ValueError: the wanted split is not there, or none was asked for and it is not clear which.
    """
    known = printable(", ".join([*available, ALL]))
    if wanted is None:
        if not available:
            return None
        found = available[0] if len(available) == 1 else _matching(available, "train")
        if found is None:
            raise ValueError(f"{where} has no split `train`: choose a split ({known})")
        return found
    if not available:
        if wanted == ALL:
            return None
        raise NoSplits(f"{where} has no splits, so no {wanted!r}: leave split out")
    found = wanted if wanted == ALL else _matching(available, wanted)
    if found is None:
        raise ValueError(f"{where} has no split {wanted!r}: choose from {known}")
    return found


def _matching(available: Sequence[str], wanted: str) -> str | None:
    """The split of this name, else one whose name says the same."""
    if wanted in available:
        return wanted
    meant = split_name(wanted)
    same = _VALIDATION if meant in _VALIDATION else (meant,)
    return next((one for one in available if meant and split_name(one) in same), None)


def stratified_split(
    labels: Sequence[int], fraction: float, *key: str | int
) -> tuple[list[int], list[int]]:
    """Hold out ``fraction`` of every class, at random but fixed by ``key``.

    A class with two images or more gives at least one and keeps at least one; a class with one keeps it.

    Args:
        labels: a class id an image.
        fraction: from 0 (hold out nothing) up to, but not, 1.
        key: of the generator, such as ``(seed, "validation")``.

    Returns:
        The indices kept and those held out, each in rising order.

    Raises:
        ValueError: ``fraction`` is outside its range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"can't hold out {fraction} of the images: give a share from 0 up to 1")
    ids = torch.as_tensor(labels)
    held: list[int] = []
    for label in ids.unique().tolist() if fraction else []:
        members = (ids == label).nonzero().flatten()
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        order = torch.randperm(len(members), generator=generator(*key, label))
        held += members[order[:count]].tolist()
    chosen = set(held)
    return [i for i in range(len(ids)) if i not in chosen], sorted(held)
