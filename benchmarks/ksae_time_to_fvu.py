"""Time until a k-SAE explains enough: ours against the dense released step, with the same hyper-parameters.

    revelio extract ... --out runs/mini     # a store of real activations
    python benchmarks/ksae_time_to_fvu.py --store runs/mini/up_ft1-t25-empty-d0 --json ksae_time_to_fvu.json

The goal is the fraction of variance unexplained that the dense step reaches after ``--steps`` steps (mean
of the last five batches). Both start from the same weights in mode `as_code` and read the same batches; they
take turns, and each one's clock runs only during its own steps.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from ksae_dense import DenseStep
from torch import Tensor

from revelio.activations.store import ActivationStore
from revelio.analysis.top_images import pooled
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import Shuffled
from revelio.sae.kernels.select import choose_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import begin, train


def read(path: Path) -> Tensor:
    """All pooled activations of a store (N d)."""
    return torch.cat([pooled(rows) for _, rows in ActivationStore.open(path).batches(1024)])


def race(arguments: argparse.Namespace, rows: Tensor) -> dict[str, Any]:
    """Both learn on the same batches; gives losses and seconds of every step."""
    d, n = rows.shape[1], rows.shape[1] * arguments.expansion
    settings = TrainConfig(
        steps=arguments.steps,
        batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup,
    )
    model = KSparseAutoencoder(d, n, arguments.k, "as_code")
    begin(model, Shuffled(rows, arguments.batch, settings.seed), settings)
    dense = DenseStep(d, n, arguments.k, rows, arguments.learning_rate, arguments.warmup)
    with torch.no_grad():
        dense.W_enc.copy_(model.W_enc.T)
        dense.W_dec.copy_(model.W_dec)
        dense.b_dec.copy_(model.b_dec)
    kernel = choose_kernel(arguments.kernel).kernel
    own = train(KSparseAutoencoder(d, n, arguments.k, "as_code"), rows, settings, kernel=kernel)
    source, epoch = Shuffled(rows, arguments.batch, settings.seed), 0
    found: dict[str, list[tuple[float, float]]] = {"dense": [], "own": []}
    while len(found["own"]) < arguments.steps:
        for batch in list(source.epoch(epoch))[: arguments.steps - len(found["own"])]:
            began = time.perf_counter()
            loss = float(dense.step(batch))
            between = time.perf_counter()
            found["own"].append((next(own).loss, 0.0))
            end = time.perf_counter()
            found["dense"].append((loss, between - began))
            found["own"][-1] = (found["own"][-1][0], end - between)
        epoch += 1
    return {"d": d, "n": n, "rows": len(rows), "steps": found}


def reached(steps: list[tuple[float, float]], goal: float) -> tuple[int, float]:
    """The step and the seconds at which the mean of five losses is first within 0.1 % of a goal."""
    for end in range(5, len(steps) + 1):
        if sum(loss for loss, _ in steps[end - 5 : end]) / 5 <= goal * 1.001:
            return end, sum(seconds for _, seconds in steps[:end])
    raise ValueError(f"the goal {goal:.4f} was not reached: raise --steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="a store of pooled activations")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--kernel", choices=["auto", "native", "torch"], default="auto")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    sizes = {"steps": 150, "batch": 256, "k": 32, "expansion": 128, "warmup": 50}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    found = race(arguments, read(arguments.store))
    steps = found.pop("steps")
    goal = sum(loss for loss, _ in steps["dense"][-5:]) / 5
    report = {**found, **{name: getattr(arguments, name) for name in sizes}, "fvu": round(goal, 4)}
    for name, taken in steps.items():
        step, seconds = reached(taken, goal)
        report[name] = {"steps": step, "seconds": round(seconds, 2)}
    report["times"] = round(report["dense"]["seconds"] / report["own"]["seconds"], 2)
    report["load"] = round(os.getloadavg()[0], 1)
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
