"""Splits that keep the classes' shares: a validation set out of train, a test set out of everything."""

from collections.abc import Sequence

import torch

from revelio.seeds import generator


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
