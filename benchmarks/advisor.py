"""The advisor's race against the full grid it replaces, on resamplings of the images.

Each resampling draws images out of a folder of stores (`revelio extract` of several layers, timesteps and
prompts). The full grid measures every candidate on all of them; the race is the advisor's own, with its
defaults. Counted are passes of the model, an image each, which is what both spend their time on. Reported:
how often both recommend the same, what the race's choice loses on all images where they differ, and, as the
ceiling, how often full grids on two resamplings recommend the same.

    revelio extract --layers bottleneck up_ft0 up_ft1 --timesteps 0 25 100 --prompts empty generic --out grid
    python benchmarks/advisor.py --stores grid --json advisor.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

import numpy as np

from revelio.activations.store import ActivationStore
from revelio.advisor.config import FIRST_OF_CLASS, AdviseConfig
from revelio.advisor.halving import halve, ranked, sizes
from revelio.advisor.measures import Measured, nested_order, right_by_linear
from revelio.stats import paired, proportion

# (timestep, prompt, layer)
Candidate = tuple[int | None, str, str]
DEFAULT = AdviseConfig()


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


class Race:
    """The advisor's race on some images, and the full grid on the same ones."""

    def __init__(
        self, rows: Mapping[Candidate, np.ndarray], labels: np.ndarray, images: np.ndarray
    ):
        order = nested_order(labels[images].tolist(), len(images), 0)
        self.images, self.rows, self.labels = images[order], rows, labels
        self.spent, self._until = 0, 0
        self._known: dict[tuple[Candidate, int], Measured] = {}

    def measured(self, racing: Sequence[Candidate], count: int) -> dict[Candidate, Measured]:
        """Measure candidates on the first so many images."""
        self.spent += len({one[:2] for one in racing}) * (count - self._until)
        self._until = count
        return {one: self.on(one, count) for one in racing}

    def on(self, one: Candidate, count: int) -> Measured:
        """One candidate on the first so many images."""
        if (one, count) not in self._known:
            some = self.images[:count]
            right = right_by_linear(self.rows[one][some], self.labels[some], 0)
            self._known[one, count] = Measured({"linear": right}, {})
        return self._known[one, count]

    def run(self) -> tuple[Candidate, list[int]]:
        """What the race recommends, and how many images each of its rounds had."""
        first = max(DEFAULT.first_images, FIRST_OF_CLASS * len(np.unique(self.labels)))
        rounds = halve(
            list(self.rows),
            self.measured,
            sizes(first, len(self.images), DEFAULT.growth),
            by="linear",
            pass_of=lambda one: one[:2],
            growth=DEFAULT.growth,
            confidence=DEFAULT.confidence,
        )
        return ranked(rounds[-1].found, "linear")[0], [one.images for one in rounds]

    def full(self) -> Candidate:
        """What the full grid recommends."""
        found = {one: self.on(one, len(self.images)) for one in self.rows}
        return ranked(found, "linear")[0]


def main() -> None:
    """Race on every resampling, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--images", type=int, default=DEFAULT.most_images)
    parser.add_argument("--resamplings", type=int, default=20)
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    rows, labels = opened(flags.stores)
    passes = len({one[:2] for one in rows})
    whole = {one: right_by_linear(each, labels, 0) for one, each in rows.items()}
    fast, slow, costs, worse = [], [], [], 0
    for seed in range(flags.resamplings):
        images = np.random.default_rng(seed).permutation(len(labels))[: flags.images]
        race = Race(rows, labels, images)
        chosen, rounds = race.run()
        costs.append(passes * len(images) / race.spent)
        best = race.full()
        fast.append(chosen)
        slow.append(best)
        gap = paired(race.on(chosen, flags.images).right["linear"],
                     race.on(best, flags.images).right["linear"])  # fmt: skip
        worse += gap.interval is not None and gap.interval[1] < 0
        print(
            f"{seed}: {chosen}, full grid {best}, {costs[-1]:.1f} times, rounds {rounds}",
            flush=True,
        )
    same = sum(a == b for a, b in zip(fast, slow, strict=True))
    pairs = [a == b for a, b in combinations(slow, 2)]
    lost = [whole[b].mean() - whole[a].mean() for a, b in zip(fast, slow, strict=True)]
    top = max(float(right.mean()) for right in whole.values())
    found = {
        "candidates": len(rows),
        "passes": passes,
        "images": flags.images,
        "of": len(labels),
        "times as few passes": {"mean": round(mean(costs), 2), "least": round(min(costs), 2)},
        "same recommendation": proportion(same, flags.resamplings),
        "same layer": proportion(
            sum(a[2] == b[2] for a, b in zip(fast, slow, strict=True)), flags.resamplings
        ),
        "surely worse than the full grid's, on its own images": worse,
        "full grids of two resamplings agree": round(mean(pairs), 3),
        "points lost on all images": {"mean": round(100 * mean(lost), 2), "most": round(100 * max(lost), 2)},
        "points that the best of all has over the choice": {
            "race": round(100 * mean(top - whole[one].mean() for one in fast), 2),
            "full grid": round(100 * mean(top - whole[one].mean() for one in slow), 2),
            "a candidate at random": round(
                100 * (top - mean(float(right.mean()) for right in whole.values())), 2
            ),
        },
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
