"""Do the intervals of `revelio.analysis.paired` cover the truth? Simulated, and `docs/intervals.md` from it.

    python -m tools.intervals --draws 400 --others 150

Draws pictures of eight classes anew, many times, and compares an autoencoder whose latents look for the
classes with one of random directions: once where labels say nothing (null), once where they do. The truth is
0 where labels say nothing, and the mean over all draws elsewhere.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revelio.analysis import controls
from revelio.analysis.paired import FREEDOM, ORDERS, Measured, image_subsets, interval
from revelio.analysis.top_images import TopImages
from revelio.evaluation.encoded import encoded
from revelio.evaluation.measures import MEASURES, held_out
from revelio.run_dir import read_json, write_json, write_whole
from revelio.sae.model import KSparseAutoencoder
from revelio.stats import t_quantile, wilson95

CASES = {"null": 0.0, "labels": 0.6}
IMAGES, WIDTH, CLASSES, LATENTS, TOP, K = 400, 12, 8, 100, 10, 8
OTHERS = ("fvu", "cosine", "distinct purity", "probe 5", "coverage 0.5", "significant")
Draw = Callable[[int, float], dict[str, list[float]]]


def pictures(seed: int, apart: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Activations, labels, and the directions of the two autoencoders; classes lie ``apart``."""
    draw, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    centers = torch.randn(CLASSES, WIDTH, generator=fixed)
    other = torch.randn(LATENTS, WIDTH, generator=fixed)
    own = centers.repeat(LATENTS // CLASSES + 1, 1)[:LATENTS]
    own = own + 0.5 * torch.randn(LATENTS, WIDTH, generator=fixed)
    labels = torch.randint(CLASSES, (IMAGES,), generator=draw)
    rows = torch.randn(IMAGES, WIDTH, generator=draw) + apart * centers[labels]
    return rows, labels, {"own": own, "other": other}


def purity_draw(seed: int, apart: float) -> dict[str, list[float]]:
    """The forms of purity: the difference, and the ends of its interval."""
    rows, labels, directions = pictures(seed, apart)
    subsets, found = image_subsets(IMAGES, seed), {}
    for name, each in directions.items():
        codes = (rows @ each.T).clamp(min=0)
        values, indices = codes.topk(controls.SPARE * TOP, dim=0)
        top = TopImages(
            values.T,
            torch.where(values > 0, indices, -1).T,
            (codes > 0).sum(0),
            codes.mean(0),
            IMAGES,
            labels,
            tuple("abcdefgh"),
            {},
        )
        found[name] = controls.judge(top, torch.arange(LATENTS), TOP, subsets).measures
    return {name: _gap(found["own"][name], found["other"][name]) for name in controls.BETTER}


def other_draw(seed: int, apart: float) -> dict[str, list[float]]:
    """The other measures of `revelio eval-ksae`."""
    rows, labels, directions = pictures(seed, apart)
    images, found = held_out(rows, labels, image_subsets(IMAGES, seed), seed), {}
    for name, each in directions.items():
        model = controls.control_of(KSparseAutoencoder(WIDTH, LATENTS, K), each, rows)
        codes = encoded(model, rows)
        found[name] = {one: MEASURES[one].function(codes, images) for one in OTHERS}
    return {name: _gap(found["own"][name], found["other"][name]) for name in OTHERS}


def _gap(ours: Measured | None, other: Measured | None) -> list[float]:
    assert ours is not None and other is not None
    gap = Measured(ours.whole - other.whole, ours.subsets - other.subsets)
    return [gap.whole, *interval(gap)]


def coverage(draws: Sequence[Mapping[str, list[float]]], null: bool) -> dict[str, Any]:
    """By measure: the truth, the share of intervals that hold it, and how wide they are.

    ``ratio``: the mean variance that the intervals claim over that of the draws, as a ratio of deviations.
    """
    found = {}
    for name in draws[0]:
        value, low, high = np.array([one[name] for one in draws]).T
        truth = 0.0 if null and name in controls.BETTER else float(value.mean())
        inside = int(((low <= truth) & (truth <= high)).sum())
        claimed = (high - low) / 2 / t_quantile(FREEDOM)
        spread = float(value.std(ddof=1))
        found[name] = {
            "truth": truth,
            "covered": inside / len(draws),
            "interval": wilson95(inside, len(draws)),
            "draws": len(draws),
            "ratio": float(sqrt((claimed**2).mean()) / spread) if spread > 0 else None,
        }
    return found


def simulate(draws: int, others: int) -> dict[str, Any]:
    """All measures in both cases."""
    made: dict[str, Any] = {}
    for case, apart in CASES.items():
        made[case] = {}
        for draw, count in ((purity_draw, draws), (other_draw, others)):
            each = [draw(1000 + seed, apart) for seed in range(count)]
            made[case] |= coverage(each, case == "null")
            print(case, draw.__name__, {n: one["covered"] for n, one in made[case].items()})
    sizes = {"images": IMAGES, "classes": CLASSES, "latents": LATENTS, "orders": ORDERS}
    command = f"python -m tools.intervals --draws {draws} --others {others}"
    return {**sizes, "freedom": FREEDOM, "command": command, "cases": made}


def page(result: Mapping[str, Any]) -> str:
    """`docs/intervals.md`, what covers worst first."""
    cases = result["cases"]
    names = sorted(
        cases["null"], key=lambda n: -max(abs(cases[c][n]["covered"] - 0.95) for c in CASES)
    )
    far = [n for n in names if any(abs(cases[c][n]["covered"] - 0.95) > 0.02 for c in CASES)]
    lines = [
        "# What the intervals cover",
        "",
        f"`{result['command']}`: {result['images']} pictures of {result['classes']} classes drawn anew; the "
        f"difference of two autoencoders of {result['latents']} latents; 95 % intervals from random halves "
        f"and quarters of the pictures in {result['orders']} orders (`revelio/analysis/paired.py`). Null: "
        "labels say nothing. In brackets what the draws leave open (Wilson, 95 %), then the claimed "
        "deviation over the true one.",
        "",
        f"Further than 2 points from 95 %: {', '.join(far) if far else 'none'}.",
        "",
        "| measure | null | labels matter |",
        "|---|---:|---:|",
    ]
    for name in names:
        lines.append(f"| {name} | {_cell(cases['null'][name])} | {_cell(cases['labels'][name])} |")
    return "\n".join(lines) + "\n"


def _cell(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    ratio = "no spread" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
    return f"{entry['covered']:.1%} [{low:.1%}, {high:.1%}]; {ratio}"


def main() -> None:
    """Simulate unless only the page is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=400, help="of the forms of purity")
    parser.add_argument("--others", type=int, default=150, help="of the other measures")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--page-only", action="store_true")
    flags = parser.parse_args()
    file = flags.docs / "intervals.json"
    if not flags.page_only:
        write_json(file, simulate(flags.draws, flags.others))
    write_whole(flags.docs / "intervals.md", page(read_json(file)))


if __name__ == "__main__":
    main()
