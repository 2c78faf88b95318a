"""Which split of a source is meant, what splits are called, and splits that keep the classes' shares."""

import re
from collections.abc import Sequence

import torch

from revelio.seeds import generator
from revelio.trust import printable

ALL = "all"
_VALIDATION = ("validation", "valid", "val", "dev")
# What a name may hold beside the split: Training, seg_train, "Test Set", imgs-val, train2017, 02_dev_32x32.
# Any separator or none stands between; one character a step keeps the match linear.
_BESIDE = r"(?:seg|data|sets?|split|images?|imgs?|pictures?|pics?|photos?|jpe?g|png|x(?=\d)|v(?=\d)|[\W\d_])*"
_NAMED = re.compile(
    rf"{_BESIDE}(?:(train|test)ing|(train[\W_]*val|train|test|validation|valid|val|dev|evaluation|eval))"
    rf"{_BESIDE}"
)
# Parts of data sets that are no training, validation or test split by name: their own name is all they say.
_OWN = re.compile(
    rf"{_BESIDE}(?:fold|part|query|gallery|probe|hold[\W_]*out|held[\W_]*out|un[\W_]*label+ed|extra|pred(?:iction)?s?)"
    rf"{_BESIDE}"
)
_WORDS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")


class NoSplits(ValueError):
    """A split was asked for of images that have none."""


def split_name(name: str) -> str | None:
    """The split that a folder or file of this name holds, in any case; None where it names none."""
    found = _NAMED.fullmatch(name.casefold())
    if found is None:
        return None
    return found.group(1) or "".join(_WORDS.findall(found.group(2)))


def split_like(name: str) -> str | None:
    """What in a name may be meant as a split's, where it is not only that; None where nothing is.

    ``PublicTest`` and ``cats_train`` hold a split's word beside others; ``fold1`` and ``gallery`` are what
    parts of data sets are called.
    """
    if _OWN.fullmatch(name.casefold()):
        return name.casefold()
    words = _WORDS.findall(_CAMEL.sub(" ", name))
    return next((found for word in words if (found := split_name(word)) is not None), None)


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
