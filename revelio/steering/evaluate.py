"""How well a concept is erased or brought in: rates by a judge, with intervals over prompts and seeds.

    target rate   share of pictures of prompts that name the concept in which the judge sees it
    survival      share of the other prompts' pictures in which the judge still sees what they name
    distance      mean absolute difference of those pictures from the unsteered ones, 0 to 1

The last two say what erasing costs. `relative` divides a rate by that of the unsteered model on the same
prompts and the same noise. Intervals are 95 % bootstrap intervals: prompts are resampled, and seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

Rates = Float[np.ndarray, "prompts seeds"]


@dataclass(frozen=True)
class Drawn:
    """Pictures of some prompts, several seeds each.

    Attributes:
        wanted: the class that each prompt names.
        seen: the class that the judge sees in each picture, a row a prompt.
        pictures: (prompts seeds h w 3) in 0 to 1.
        seconds: time a picture.
    """

    wanted: Sequence[str]
    seen: Sequence[Sequence[str]]
    pictures: Float[np.ndarray, "prompts seeds h w 3"]
    seconds: float

    def sees(self, target: str) -> Rates:
        """Where the judge sees the target, of the prompts that name it: 1 or 0."""
        rows = [row for row, wanted in zip(self.seen, self.wanted, strict=True) if wanted == target]
        return np.array([[seen == target for seen in row] for row in rows], dtype=float)

    def keeps(self, target: str) -> Rates:
        """Where the judge sees what a prompt names, of the prompts that name something else: 1 or 0."""
        return np.array(
            [
                [seen == wanted for seen in row]
                for row, wanted in zip(self.seen, self.wanted, strict=True)
                if wanted != target
            ],
            dtype=float,
        )

    def becomes(self, target: str) -> Rates:
        """Where the judge sees the target, of the prompts that name something else: 1 or 0."""
        rows = [row for row, wanted in zip(self.seen, self.wanted, strict=True) if wanted != target]
        return np.array([[seen == target for seen in row] for row in rows], dtype=float)

    def distance(self, other: "Drawn", target: str) -> Rates:
        """Mean absolute difference from other pictures, of the prompts that do not name the target."""
        rows = [index for index, wanted in enumerate(self.wanted) if wanted != target]
        apart = np.abs(self.pictures[rows] - other.pictures[rows])
        return apart.mean(axis=(2, 3, 4))


def as_pixels(pictures: Sequence[Image.Image]) -> Float[np.ndarray, "b h w 3"]:
    """Pictures as numbers from 0 to 1."""
    return np.stack([np.asarray(one.convert("RGB"), dtype=np.float32) / 255 for one in pictures])


def mean_interval(rates: Sequence[Rates], seed: int = 0, draws: int = 2000) -> dict[str, float]:
    """The mean over all pictures, of one experiment or of several together, with its interval."""
    return _entry(_mean(rates), _sums(rates, seed, draws) / sum(one.size for one in rates))


def ratio_interval(
    rates: Sequence[Rates], plain: Sequence[Rates], seed: int = 0, draws: int = 2000
) -> dict[str, float] | None:
    """The ratio of two means on the same prompts and seeds, resampled together.

    None where the second is 0, which nothing can be relative to: the judge sees none of what the unsteered
    model draws.
    """
    whole = _mean(plain)
    if whole == 0:
        return None
    above, below = (_sums(part, seed, draws) for part in (rates, plain))
    return _entry(_mean(rates) / whole, above / np.maximum(below, 1e-12))


def difference_interval(
    rates: Sequence[Rates], others: Sequence[Rates], seed: int = 0, draws: int = 2000
) -> dict[str, float]:
    """The difference of two means on the same prompts and seeds: it beats the other where 0 is outside."""
    apart = _sums(rates, seed, draws) - _sums(others, seed, draws)
    return _entry(_mean(rates) - _mean(others), apart / sum(one.size for one in rates))


def measured(
    drawn: Mapping[str, Drawn], plain: Mapping[str, Drawn], seed: int = 0, draws: int = 2000
) -> dict[str, Any]:
    """All measures of a method over some targets, each with its interval.

    Args:
        drawn: the steered pictures, by target.
        plain: the unsteered ones of the same prompts and noise.
        seed: of the resampling.
        draws: resamples.
    """
    each = {name: drawn[name] for name in drawn}

    def rates(what: str, of: Mapping[str, Drawn]) -> list[Rates]:
        return [getattr(of[name], what)(name) for name in each]

    return {
        "target": mean_interval(rates("sees", each), seed, draws),
        "target_relative": ratio_interval(rates("sees", each), rates("sees", plain), seed, draws),
        "others": mean_interval(rates("keeps", each), seed, draws),
        "survival": ratio_interval(rates("keeps", each), rates("keeps", plain), seed, draws),
        "turned_into": mean_interval(rates("becomes", each), seed, draws),
        "distance": mean_interval(
            [each[name].distance(plain[name], name) for name in each], seed, draws
        ),
        "seconds": float(np.mean([one.seconds for one in each.values()])),
    }


def _mean(rates: Sequence[Rates]) -> float:
    return float(sum(one.sum() for one in rates) / sum(one.size for one in rates))


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
