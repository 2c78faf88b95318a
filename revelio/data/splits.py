"""Which split of a source is meant, and splits that keep the classes' shares."""

from collections.abc import Sequence

import torch

from revelio.seeds import generator
from revelio.trust import printable

SPLIT_NAMES = ("train", "trainval", "validation", "valid", "val", "test")
ALL = "all"
_VALIDATION = ("validation", "valid", "val")


class NoSplits(ValueError):
    """A split was asked for of images that have none."""


def choose_split(available: Sequence[str], wanted: str | None, where: str) -> str | None:
    """The split to take: the wanted one, else ``train``, else the only one.

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
        if "train" in available or len(available) == 1:
            return "train" if "train" in available else available[0]
        raise ValueError(f"{where} has no split `train`: choose a split ({known})")
    if not available:
        if wanted == ALL:
            return None
        raise NoSplits(f"{where} has no splits, so no {wanted!r}: leave split out")
    if wanted in available or wanted == ALL:
        return wanted
    if wanted in _VALIDATION:
        for other in _VALIDATION:
            if other in available:
                return other
    raise ValueError(f"{where} has no split {wanted!r}: choose from {known}")


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
