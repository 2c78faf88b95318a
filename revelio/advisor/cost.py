"""What a race will cost at most, from what one image costs in each pass and one candidate in each round.

passes of a round   all at first, then one in ``growth`` and one more a further model; the dearest, at worst
seconds             sum over rounds of new images * passes * seconds of a pass + candidates * probes
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from revelio.advisor.candidates import Candidate
from revelio.advisor.halving import most_passes
from revelio.advisor.measures import measure
from revelio.machine import duration
from revelio.wording import plural

# Of more rows than this the probes' time is scaled: neighbors are all pairs of rows.
PROBED = 512


@dataclass(frozen=True)
class RaceCost:
    """What the rounds take.

    Attributes:
        candidates: how many are compared.
        images: of each round, all that a candidate in it has seen.
        passes: of each round, the most passes of models that are in it.
        seconds: of each round, the most that it takes.
    """

    candidates: int
    images: tuple[int, ...]
    passes: tuple[int, ...]
    seconds: tuple[float, ...]

    def line(self, begun: bool = False) -> str:
        """The plan as one line for people; of a race that was ``begun``, whose rest takes less, the most."""
        (first, *more), (all_passes, *fewer) = self.images, self.passes
        rounds = [f"{plural(all_passes, 'pass', 'passes')} on {plural(first, 'image')}"]
        rounds += [
            f"at most {passes:,} on {images:,}" for images, passes in zip(more, fewer, strict=True)
        ]
        most = f"at most {duration(sum(self.seconds))}"
        if more and not begun:
            most = f"{duration(self.seconds[0])} if the first round decides, {most}"
        return f"plan: {plural(self.candidates, 'candidate')}, {', then '.join(rounds)}: {most} (measured)"


def race_cost(
    seconds: Mapping[Candidate, float], images: Sequence[int], growth: int, probes: Sequence[float]
) -> RaceCost:
    """The most that a race costs.

    Args:
        seconds: of one image through the model up to a candidate's layer.
        images: how many each round has.
        growth: one in so many passes stays after a round.
        probes: the seconds that one candidate's probes take in each round.
    """
    models = len({one.model for one in seconds})
    by_pass: dict[tuple[str, int | None, str], float] = {}
    layers: dict[tuple[str, int | None, str], int] = {}
    for one, each in seconds.items():
        by_pass[one.model_pass] = max(each, by_pass.get(one.model_pass, 0.0))
        layers[one.model_pass] = layers.get(one.model_pass, 0) + 1
    dearest, widest = (sorted(found.values(), reverse=True) for found in (by_pass, layers))
    passes, before = [len(by_pass)], 0
    spent: list[float] = []
    for number, (count, probe) in enumerate(zip(images, probes, strict=True)):
        if number:
            stay = most_passes(passes[-1], growth, first=number == 1) + models - 1
            passes.append(min(passes[-1], stay))
        new = (count - before) * sum(dearest[: passes[-1]])
        spent.append(new + sum(widest[: passes[-1]]) * probe)
        before = count
    return RaceCost(len(seconds), tuple(images), tuple(passes), tuple(spent))


def probe_seconds(images: Sequence[int], width: int, classes: int, seed: int) -> list[float]:
    """How long one candidate's probes take in each round, measured on noise of the same size.

    Args:
        images: how many each round has.
        width: of a row.
        classes: how many there are; 0: no labels.
        seed: of the parts that the probe is tested on.
    """
    found = []
    for count in images:
        some = min(count, PROBED)
        rows = np.random.default_rng(0).normal(size=(some, width)).astype(np.float32)
        labels = np.arange(some) % classes if classes else None
        began = time.perf_counter()
        measure(rows, labels, seed)
        found.append((time.perf_counter() - began) * (count / some) ** 2)
    return found
