"""The advisor's race against the full grid it replaces, on resamplings of the images.

Each resampling draws images out of a folder of stores (`revelio extract` of several layers, timesteps and
prompts). The full grid measures every candidate on all of them; the race is the advisor's own, with its
defaults; both recommend by the same rule (the cheapest of those that are not told apart from the best; of
equally cheap ones that of the first prompt with the least noise). Counted are passes of the model, an image
each, which is what both spend their time on. What equally cheap ones are sorted by is a prior; how much hangs
on it two other orders say: the reverse, which has the worst first, and one shuffled anew for each
resampling. Reported: how often both recommend the same; as the ceiling, how often
full grids on two resamplings do; how often the race's choice is one that the full grid does not tell apart
from its best; and what the choices lose on all images.

    revelio extract --layers bottleneck up_ft0 up_ft1 --timesteps 0 25 100 --prompts empty generic --out grid
    python benchmarks/advisor.py --stores grid --json advisor.json
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from operator import eq
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from revelio.activations.store import ActivationStore
from revelio.advisor.config import FIRST_OF_CLASS, AdviseConfig
from revelio.advisor.halving import contenders, halve, preferred, sizes
from revelio.advisor.measures import Measured, nested_order, right_by_linear
from revelio.stats import mean95, proportion, rounded

# (timestep, prompt, layer)
Candidate = tuple[int, str, str]
DEFAULT = AdviseConfig()
BY = "linear"
DEPTH = ("bottleneck", "up_ft0", "up_ft1", "up_ft2", "up_ft3")
ORDERS = ("the advisor's", "reversed", "shuffled")


def opened(folder: Path) -> tuple[dict[Candidate, np.ndarray], np.ndarray]:
    """The rows of every candidate, and the labels."""
    stores = [ActivationStore.open(path.parent) for path in sorted(folder.glob("*/manifest.json"))]
    rows = {}
    for one in stores:
        key = (one.manifest["timestep"], one.manifest["prompt_policy"], one.manifest["layer"])
        rows[key] = one.tensor().numpy()
    labels = stores[0].labels
    assert labels is not None and all(one.ids == stores[0].ids for one in stores)
    return rows, labels.numpy()


class Images:
    """Some images, and how the candidates do on the first of them."""

    def __init__(
        self, rows: Mapping[Candidate, np.ndarray], labels: np.ndarray, images: np.ndarray
    ):
        order = nested_order(labels[images].tolist(), len(images), 0)
        self.images, self.rows, self.labels = images[order], rows, labels
        self._known: dict[tuple[Candidate, int], Measured] = {}

    def measured(self, candidates: Iterable[Candidate], count: int) -> dict[Candidate, Measured]:
        """Candidates on the first so many images."""
        return {one: self._on(one, count) for one in candidates}

    def _on(self, one: Candidate, count: int) -> Measured:
        if (one, count) not in self._known:
            some = self.images[:count]
            right = right_by_linear(self.rows[one][some], self.labels[some], 0)
            self._known[one, count] = Measured({BY: right}, {})
        return self._known[one, count]

    def full(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """What the full grid does not tell apart from its best; it recommends the first."""
        found = self.measured(candidates, len(self.images))
        return contenders(found, BY, DEFAULT.confidence)

    def race(self, candidates: Sequence[Candidate]) -> tuple[Candidate, float]:
        """What the race recommends, and how many times as many passes the full grid takes."""
        first = max(DEFAULT.first_images, FIRST_OF_CLASS * len(np.unique(self.labels)))
        rounds = halve(
            candidates,
            self.measured,
            sizes(first, len(self.images), DEFAULT.growth),
            by=BY,
            pass_of=pass_of,
            growth=DEFAULT.growth,
            confidence=DEFAULT.confidence,
        )
        spent = until = 0
        for one in rounds:
            spent += len({pass_of(each) for each in one.found}) * (one.images - until)
            until = one.images
        chosen = preferred(rounds[-1].found, BY, DEFAULT.confidence)[0]
        return chosen, len(passes_of(candidates)) * len(self.images) / spent


def pass_of(one: Candidate) -> tuple[str, int]:
    """The pass of the model."""
    return one[1], one[0]


def passes_of(candidates: Iterable[Candidate]) -> list[tuple[str, int]]:
    """All passes, sorted."""
    return sorted({pass_of(one) for one in candidates})


def given(candidates: Iterable[Candidate], passes: Sequence[tuple[str, int]]) -> list[Candidate]:
    """The candidates from the cheapest on, which is by depth; equally cheap ones in the order of passes."""
    return sorted(candidates, key=lambda one: (DEPTH.index(one[2]), passes.index(pass_of(one))))


def compared(
    resamplings: Sequence[Images], order: str, whole: Mapping[Candidate, float]
) -> dict[str, Any]:
    """Race and full grid on every resampling, with the passes in some order."""
    fast, slow, times, within = [], [], [], 0
    for seed, images in enumerate(resamplings):
        passes = passes_of(whole)
        if order == "reversed":
            passes.reverse()
        if order == "shuffled":
            np.random.default_rng(seed).shuffle(passes)
        candidates = given(whole, passes)
        chosen, ratio = images.race(candidates)
        equals = images.full(candidates)
        fast.append(chosen)
        slow.append(equals[0])
        times.append(ratio)
        within += chosen in equals
        print(f"{order} {seed}: {chosen}, full grid {equals[0]} of {len(equals)}", flush=True)
    count, top = len(resamplings), max(whole.values())
    lost = [100 * (whole[b] - whole[a]) for a, b in zip(fast, slow, strict=True)]
    found = {
        "times as few passes": {"mean": round(mean(times), 2), "least": round(min(times), 2)},
        "same recommendation": proportion(sum(map(eq, fast, slow)), count),
        "not told apart from the full grid's best": proportion(within, count),
        "points lost on all images": rounded(mean(lost), mean95(lost)),
        "points that the best of all has over the choice": {
            "race": round(100 * mean(top - whole[one] for one in fast), 2),
            "full grid": round(100 * mean(top - whole[one] for one in slow), 2),
            "a candidate at random": round(100 * (top - mean(whole.values())), 2),
        },
    }
    if order != "shuffled":  # there each resampling has an order of its own
        same = mean(a == b for a, b in combinations(slow, 2))
        found["full grids of two resamplings agree"] = round(same, 3)
    return found


def main() -> None:
    """Race on every resampling, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--images", type=int, default=DEFAULT.most_images)
    parser.add_argument("--resamplings", type=int, default=20)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    rows, labels = opened(flags.stores)
    whole = {one: float(right_by_linear(each, labels, 0).mean()) for one, each in rows.items()}
    resamplings = []
    for seed in range(flags.resamplings):
        images = np.random.default_rng(seed).permutation(len(labels))[: flags.images]
        resamplings.append(Images(rows, labels, images))
    found = {"candidates": len(rows), "passes": len(passes_of(rows)), "images": flags.images}
    found |= {"of": len(labels), "resamplings": flags.resamplings}
    orders = {order: compared(resamplings, order, whole) for order in ORDERS}
    found["order of equally cheap ones"] = orders
    print(json.dumps(found, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
