"""Orderings that the paper claims of its numbers, and how probable they are given ours.

A row was measured by several trainings on the same test images. Its replicates are trainings drawn with
repetition, and images by the delete-d jackknife (Shao and Wu, 1989: a quarter is left out at random, and what
that changes is scaled to the spread of a whole sample). Rows with the same test images leave out the same
ones, so their difference is surer than either. The probability of an ordering is the share of replicates in
which it holds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from revelio.reproduce.row import Row

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Float

AXES = ("kind", "model", "layer", "timestep", "dataset", "prompt")
REPLICATES = 2000
SURE = 0.95


@dataclass(frozen=True)
class Ordering:
    """What is claimed of rows that differ in one axis, in each of the groups that the other axes make.

    Attributes:
        text: in words.
        kind: ``least`` or ``most``: the winner is below or above all others; ``rising``: in the order of the
            rows; ``mixed``: the winner is above in some groups and below in others.
        axis: a field of :class:`~revelio.reproduce.row.Row`.
        winner: its value there.
        margin: by how much at least.
        where: values of other axes that the rows must have.
        skip: a model whose rows are left out.
    """

    text: str
    kind: Literal["least", "most", "rising", "mixed"]
    axis: str
    winner: str | int = ""
    margin: float = 0.0
    where: Mapping[str, Any] = field(default_factory=dict)
    skip: str = ""

    def about(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that it is about."""
        return [
            row
            for row in rows
            if row.model != self.skip and all(getattr(row, k) == v for k, v in self.where.items())
        ]

    def holds(
        self, rows: Sequence[Row], values: "Float[np.ndarray, 'n rows']"
    ) -> "Bool[np.ndarray, ' n']":
        """Whether it holds of each of n sets of values of ``rows``, those that it is about."""
        import numpy as np

        found = np.stack([self._group(rows, values, some) for some in self.groups(rows)])
        mixed = found.any(0) & ~found.all(0)
        return np.asarray(mixed if self.kind == "mixed" else found.all(0))

    def groups(self, rows: Sequence[Row]) -> list[list[int]]:
        """The places of the rows that differ in the axis alone, for each set of values of the others."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, row in enumerate(rows):
            key = tuple(getattr(row, axis) for axis in AXES if axis != self.axis)
            groups.setdefault(key, []).append(place)
        return [some for some in groups.values() if len(some) > 1]

    def _group(
        self, rows: Sequence[Row], values: "np.ndarray", some: list[int]
    ) -> "Bool[np.ndarray, ' n']":
        import numpy as np

        if self.kind == "rising":
            return np.asarray((np.diff(values[:, some]) > 0).all(1))
        own = [place for place in some if getattr(rows[place], self.axis) == self.winner]
        rest = [place for place in some if place not in own]
        gaps = values[:, own] - values[:, rest]
        gaps = -gaps if self.kind == "least" else gaps
        return np.asarray(((gaps > 0) & (gaps >= self.margin)).all(1))


@dataclass(frozen=True)
class Replicates:
    """What a row measured.

    Attributes:
        values: a value each training.
        shifts: what leaving out each subset of the test images changes of it, scaled.
    """

    values: "Float[np.ndarray, ' trainings']"
    shifts: "Float[np.ndarray, 'trainings subsets']"

    def draw(
        self, subsets: "np.ndarray", draw: "np.random.Generator"
    ) -> "Float[np.ndarray, ' replicates']":
        """The mean over trainings in replicates, each with its own subset of the images."""
        count = len(self.values)
        chosen = draw.integers(count, size=(len(subsets), count))
        means = self.values[chosen].mean(1)
        # The mean of n drawn with repetition varies (n - 1) / n as much as it should.
        spread = math.sqrt(count / (count - 1)) if count > 1 else 1.0
        shifted = self.shifts[chosen, subsets[:, None]].mean(1)
        return self.values.mean() + spread * (means - self.values.mean()) + shifted


def judge(
    ordering: Ordering, rows: Sequence[Row], found: Mapping[Row, Replicates], seed: int = 0
) -> dict[str, Any]:
    """Whether an ordering holds: plain values, fit for JSON.

    Returns:
        ``text``, ``paper`` (whether the paper's own values have it), ``rows`` (how many it is about, of how
        many), ``verdict`` (holds, does not hold, not settled, not judged) and, unless it is not judged,
        ``holds`` (of the means), ``probability``, ``by_chance`` (how often it holds where the means are
        dealt to the rows at random) and ``trainings``. Of a group that lacks a row nothing is said, and
        single trainings settle nothing: another one might say otherwise.
    """
    import numpy as np

    claimed = ordering.about(rows)
    groups = [[claimed[one] for one in some] for some in ordering.groups(claimed)]
    about = [row for some in groups if all(row in found for row in some) for row in some]
    entry: dict[str, Any] = {"text": ordering.text, "paper": _of_paper(ordering, claimed)}
    entry["rows"] = [len(about), len(claimed)]
    if not about:
        return entry | {"verdict": "not judged"}
    draw = np.random.default_rng(seed)
    means = np.array([[found[row].values.mean() for row in about]])
    subsets = draw.integers(min(found[row].shifts.shape[1] for row in about), size=REPLICATES)
    drawn = np.stack([found[row].draw(subsets, draw) for row in about], axis=1)
    shuffled = draw.permuted(np.repeat(means, REPLICATES, axis=0), axis=1)
    probability = float(ordering.holds(about, drawn).mean())
    trainings = min(len(found[row].values) for row in about)
    words = {True: "holds", False: "does not hold"}
    settled = trainings > 1 and max(probability, 1 - probability) >= SURE
    return entry | {
        "holds": bool(ordering.holds(about, means)[0]),
        "probability": probability,
        "by_chance": float(ordering.holds(about, shuffled).mean()),
        "trainings": trainings,
        "verdict": words[probability >= SURE] if settled else "not settled",
    }


def _of_paper(ordering: Ordering, rows: Sequence[Row]) -> bool | None:
    import numpy as np

    if any(row.paper is None for row in rows):
        return None
    return bool(ordering.holds(rows, np.array([[row.paper for row in rows]], dtype=float))[0])
