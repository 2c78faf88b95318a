"""How well a concept is erased or brought in: rates by a judge, with intervals over prompts and seeds.

    target rate   share of pictures of prompts that name the concept in which the judge sees it
    survival      share of the other prompts' pictures in which the judge still sees what they name
    distance      of those pictures from the unsteered ones: mean absolute difference of pixels, 0 to 1, and
                  1 - cosine of a backbone's activations

The last two say what erasing costs. `relative` divides a rate by that of the unsteered model on the same
prompts and the same noise. Intervals are 95 % bootstrap intervals: prompts are resampled, and seeds. Where
all pictures agree, all resamples do, and know nothing of pictures that were not drawn: there Wilson's
interval says how many of them could still differ.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from revelio.stats import wilson95

Rates = Float[np.ndarray, "prompts seeds"]


@dataclass(frozen=True)
class Drawn:
    """What was seen in pictures of some prompts, several seeds each.

    Attributes:
        targets: the classes that are steered.
        wanted: the class that each prompt names.
        seen: the class that the judge sees in each picture, a row a prompt.
        distances: how far each picture is from the unsteered one of its noise, by measure: `pixels` is the
            mean absolute difference, of 1.
        seconds: time a picture.
        shows: whether a detector finds the target in each picture; None: where the judge sees it.
    """

    targets: Collection[str]
    wanted: Sequence[str]
    seen: Sequence[Sequence[str]]
    distances: Mapping[str, Rates]
    seconds: float
    shows: Rates | None = None

    def sees(self, among: Collection[int] | None = None) -> Rates:
        """Where the target shows, of the prompts that name it: 1 or 0; of those ``among`` them alone."""
        rows = [row for row in self._naming(True) if among is None or row in among]
        return self._target()[rows]

    def keeps(self) -> Rates:
        """Where the judge sees what a prompt names, of the prompts that name something else: 1 or 0."""
        right = [[one == wanted for one in row] for row, wanted in self._pairs()]
        return np.array(right, dtype=float)[self._naming(False)]

    def becomes(self) -> Rates:
        """Where the target shows, of the prompts that name something else: 1 or 0."""
        return self._target()[self._naming(False)]

    def distance(self, measure: str) -> Rates:
        """The distances of the prompts that do not name the target."""
        return self.distances[measure][self._naming(False)]

    def _pairs(self) -> Iterable[tuple[Sequence[str], str]]:
        return zip(self.seen, self.wanted, strict=True)

    def _target(self) -> Rates:
        if self.shows is not None:
            return self.shows
        return np.array([[one in self.targets for one in row] for row in self.seen], dtype=float)

    def _naming(self, target: bool) -> list[int]:
        return [row for row, one in enumerate(self.wanted) if (one in self.targets) == target]


def as_pixels(pictures: Sequence[Image.Image]) -> Float[np.ndarray, "b h w 3"]:
    """Pictures as numbers from 0 to 1."""
    return np.stack([np.asarray(one.convert("RGB"), dtype=np.float32) / 255 for one in pictures])


def mean_interval(rates: Sequence[Rates], seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """The mean over all pictures, of one experiment or of several together, with its interval."""
    return _entry(_mean(rates), _sums(rates, seed, draws) / sum(one.size for one in rates))


def share_interval(rates: Sequence[Rates], seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """The share of pictures that show something, 1 or 0 each, with its interval."""
    share, room = _mean(rates), _room(rates)
    if share in (0, 1):
        return {"value": share, "low": max(0.0, share - room), "high": min(1.0, share + room)}
    return mean_interval(rates, seed, draws)


def ratio_interval(
    rates: Sequence[Rates], plain: Sequence[Rates], seed: int = 0, draws: int = 2000
) -> dict[str, float] | None:
    """The ratio of two shares on the same prompts and seeds, resampled together; beside itself it is 1.

    None where the second is 0, which nothing can be relative to: the judge sees none of what the unsteered
    model draws.
    """
    whole = _mean(plain)
    if whole == 0:
        return None
    value, same = _mean(rates) / whole, all(map(np.array_equal, rates, plain))
    if (same or value == 0) and not all(
        one is other for one, other in zip(rates, plain, strict=True)
    ):
        room = _room(rates) / whole
        return {"value": value, "low": max(0.0, value - room), "high": min(1 / whole, value + room)}
    above, below = (_sums(part, seed, draws) for part in (rates, plain))
    known = below > 0
    return _entry(value, above[known] / below[known] if known.any() else np.full(1, value))


def difference_interval(
    rates: Sequence[Rates], others: Sequence[Rates], seed: int = 0, draws: int = 2000
) -> dict[str, float]:
    """The difference of two means on the same prompts and seeds: it beats the other where 0 is outside."""
    apart = _sums(rates, seed, draws) - _sums(others, seed, draws)
    return _entry(_mean(rates) - _mean(others), apart / sum(one.size for one in rates))


def measured(
    drawn: Sequence[Drawn], plain: Sequence[Drawn], seed: int = 0, draws: int = 2000
) -> dict[str, Any]:
    """All measures of a method over one experiment or several, each with its interval.

    Args:
        drawn: the steered pictures, an entry an experiment, such as a target.
        plain: the unsteered ones of the same prompts and noise.
        seed: of the resampling.
        draws: resamples.
    """
    target, others = [one.sees() for one in drawn], [one.keeps() for one in drawn]
    target_plain, others_plain = target, others
    if any(one is not other for one, other in zip(drawn, plain, strict=True)):
        target_plain, others_plain = [one.sees() for one in plain], [one.keeps() for one in plain]
    found: dict[str, Any] = {
        "target": share_interval(target, seed, draws),
        "target_relative": ratio_interval(target, target_plain, seed, draws),
        "others": share_interval(others, seed, draws),
        "survival": ratio_interval(others, others_plain, seed, draws),
        "turned_into": share_interval([one.becomes() for one in drawn], seed, draws),
        "seconds": float(np.mean([one.seconds for one in drawn])),
    }
    for measure in drawn[0].distances:
        name = "distance" if measure == "pixels" else f"{measure}_distance"
        found[name] = mean_interval([one.distance(measure) for one in drawn], seed, draws)
    return found


def _mean(rates: Sequence[Rates]) -> float:
    return float(sum(one.sum() for one in rates) / sum(one.size for one in rates))


def _room(rates: Sequence[Rates]) -> float:
    """How large a share can be, at 95 %, of what no picture shows: of prompts or seeds, what is more."""
    return wilson95(0, sum(max(one.shape) for one in rates))[1]


def _sums(rates: Sequence[Rates], seed: int, draws: int) -> Float[np.ndarray, " draws"]:
    """Sums over resampled prompts and seeds, each experiment resampled by itself.

    The same seed and shapes give the same prompts and seeds, so that two sets of pictures stay paired.
    """
    total = np.zeros(draws)
    for index, one in enumerate(rates):
        prompts, seeds = one.shape
        random = np.random.default_rng([seed, index, prompts, seeds])
        rows = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
        columns = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
        total += np.einsum("dp,ps,ds->d", rows, one, columns, optimize=True)
    return total


def _entry(value: float, values: Float[np.ndarray, " draws"]) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}
