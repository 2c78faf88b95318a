"""Which split of a source is meant."""

from collections.abc import Sequence

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
