"""Do the intervals of `revelio.analysis.paired` cover the truth? Simulated, and `docs/intervals.md` from it.

    python -m tools.intervals --draws 150 [--measures sigma_label]

Draws pictures of eight classes anew, many times, and compares an autoencoder whose latents look for the
classes with one of random directions: once where labels say nothing (null), once where they do. The truth is
0 where labels say nothing, but for reconstruction, and the mean over all draws elsewhere.
"""

import argparse
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revelio.analysis.controls import control_of
from revelio.analysis.paired import FREEDOM, ORDERS, SHUFFLES, difference, halves
from revelio.evaluation.encoded import encoded
from revelio.evaluation.measures import MEASURES, held_out
from revelio.run_dir import read_json, write_json, write_whole
from revelio.sae.model import KSparseAutoencoder
from revelio.stats import t_quantile, wilson95

CASES = {"null": 0.0, "labels": 0.6}
IMAGES, WIDTH, CLASSES, LATENTS, K = 400, 12, 8, 100, 8
LEFT_OUT = ("probe 1", "probe 20", "coverage 0.8")  # as probe 5 and coverage 0.5
TAKEN = [name for name in MEASURES if name not in LEFT_OUT]
Models = Mapping[str, KSparseAutoencoder]


def pictures(seed: int, apart: float) -> tuple[Tensor, Tensor]:
    """Activations and labels; the centers of the classes are the same in all draws, and lie ``apart``."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (IMAGES,), generator=draw)
    return torch.randn(IMAGES, WIDTH, generator=draw) + apart * _centers()[labels], labels


def autoencoders(apart: float) -> Models:
    """One whose latents look for the classes, one of random directions; fixed, as trained ones are."""
    fixed, rows = torch.Generator().manual_seed(98), pictures(0, apart)[0]
    other = torch.randn(LATENTS, WIDTH, generator=fixed)
    own = _centers().repeat(LATENTS // CLASSES + 1, 1)[:LATENTS]
    own = own + 0.5 * torch.randn(LATENTS, WIDTH, generator=fixed)
    model = KSparseAutoencoder(WIDTH, LATENTS, K)
    return {name: control_of(model, each, rows) for name, each in (("own", own), ("other", other))}


def _centers() -> Tensor:
    return torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))


def drawn(
    seed: int, apart: float, models: Models, names: Sequence[str] = TAKEN
) -> dict[str, list[float]]:
    """By measure: the difference of the two, and the ends of its interval."""
    rows, labels = pictures(seed, apart)
    images = held_out(rows, labels, halves(IMAGES, seed), seed)
    codes = {name: encoded(model, rows) for name, model in models.items()}
    gaps = {}
    for name in names:
        own, other = (MEASURES[name].function(codes[one], images) for one in ("own", "other"))
        assert own is not None and other is not None
        gap = difference(own, other)
        gaps[name] = [gap["value"], *gap["interval"]]
    return gaps


def coverage(draws: Sequence[Mapping[str, list[float]]], null: bool) -> dict[str, Any]:
    """By measure: the truth, the share of intervals that hold it, and how wide they are.

    ``ratio``: the mean variance that the intervals claim over that of the draws, as a ratio of deviations.
    """
    found = {}
    for name in draws[0]:
        value, low, high = np.array([one[name] for one in draws]).T
        truth = 0.0 if null and MEASURES[name].labelled else float(value.mean())
        inside = int(((low <= truth) & (truth <= high)).sum())
        claimed = (high - low) / 2 / t_quantile(FREEDOM)
        spread = float(value.std(ddof=1))
        found[name] = {
            "truth": truth,
            "covered": inside / len(draws),
            "interval": wilson95(inside, len(draws)),
            "ratio": float(sqrt((claimed**2).mean()) / spread) if spread > 0 else None,
        }
    return found


def simulate(draws: int, names: Sequence[str] = TAKEN) -> dict[str, Any]:
    """The measures in both cases."""
    made = {}
    for case, apart in CASES.items():
        models = autoencoders(apart)
        each = [drawn(1000 + seed, apart, models, names) for seed in range(draws)]
        made[case] = coverage(each, case == "null")
        print(case, {name: one["covered"] for name, one in made[case].items()})
    sizes = {"images": IMAGES, "classes": CLASSES, "latents": LATENTS, "orders": ORDERS}
    sizes |= {"shuffles": SHUFFLES, "freedom": FREEDOM}
    command = f"python -m tools.intervals --draws {draws}"
    return {**sizes, "draws": draws, "command": command, "cases": made}


def together(there: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """What was simulated before with some measures anew, of as many draws."""
    if there["draws"] != made["draws"]:
        raise ValueError(
            f"{made['draws']} draws beside {there['draws']}: give --draws {there['draws']}, or all measures"
        )
    cases = {case: there["cases"][case] | made["cases"][case] for case in CASES}
    return {**made, "cases": cases}


def page(result: Mapping[str, Any]) -> str:
    """`docs/intervals.md`, what covers worst first."""
    cases = result["cases"]
    names = sorted(
        cases["null"], key=lambda n: -max(abs(cases[c][n]["covered"] - 0.95) for c in CASES)
    )
    far = [n for n in names if any(_far(cases[case][n]) for case in CASES)]
    near = [n for n in names if any(_off(cases[case][n]["covered"]) for case in CASES)]
    alone = [n for n in near if n not in far]
    lines = [
        "# What the intervals cover",
        "",
        f"`{result['command']}`: {result['images']} pictures of {result['classes']} classes drawn anew "
        f"{result['draws']} times; the difference of two autoencoders of {result['latents']} latents; 95 % "
        f"intervals from halves of the pictures in {result['orders']} random orders, of the forms of purity "
        f"no narrower than from {result['shuffles']} random orders of the labels "
        "(`revelio/analysis/paired.py`). Null: labels say nothing. In brackets what the draws leave open "
        "(Wilson, 95 %), then the claimed deviation over the true one.",
        "",
        f"Further than 2 points from 95 %, beyond what the draws leave open: {', '.join(far) or 'none'}; by "
        f"the share alone also: {', '.join(alone) or 'none'}. Intervals of probes and coverage do not hold "
        "the chance of the half that latents were chosen on. Halves alone make sigma_label's too narrow "
        "where labels say nothing: latents share more of their top images, beyond chance, among more images.",
        "",
        "| measure | null | labels matter |",
        "|---|---:|---:|",
    ]
    for name in names:
        lines.append(f"| {name} | {_cell(cases['null'][name])} | {_cell(cases['labels'][name])} |")
    return "\n".join(lines) + "\n"


def _far(entry: Mapping[str, Any]) -> bool:
    low, high = entry["interval"]
    return high < 0.93 or low > 0.97


def _off(share: float) -> bool:
    return abs(share - 0.95) > 0.02 + 1e-9


def _cell(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    ratio = "no spread" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
    return f"{entry['covered']:.1%} [{low:.1%}, {high:.1%}]; {ratio}"


def main() -> None:
    """Simulate unless only the page is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=150)
    parser.add_argument("--measures", nargs="+", choices=TAKEN, default=TAKEN)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--page-only", action="store_true")
    flags = parser.parse_args()
    file = flags.docs / "intervals.json"
    if not flags.page_only:
        made = simulate(flags.draws, flags.measures)
        every = set(flags.measures) == set(TAKEN)
        write_json(file, made if every else together(read_json(file), made))
    write_whole(flags.docs / "intervals.md", page(read_json(file)))


if __name__ == "__main__":
    main()
