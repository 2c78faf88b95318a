"""Cost of a k-SAE training step against a dense implementation of the released one.

    python benchmarks/ksae_step.py --json ksae_step.json
    python benchmarks/ksae_step.py --batches 256 --rounds 3

Both models live in one process on the same structured rows (64 directions plus noise) and take steps in
turn; medians of wall and processor time are printed. Two figures for the sparse step: as it comes, and
with every latent's row moving, its worst case. Peak memory is each variant's own process's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from revelio.sae.model import KSparseAutoencoder
from revelio.sae.state import TrainSettings
from revelio.sae.train import train

GIB = 2**30


class DenseStep:
    """The released step, plainly: dense code, dense decoder product, autograd, Adam's defaults."""

    def __init__(self, d: int, n: int, k: int, rows: Tensor) -> None:
        self.k = k
        self.W_enc = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d, n)))
        self.b_enc = nn.Parameter(torch.zeros(n))
        self.W_dec = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(n, d)))
        self.b_dec = nn.Parameter(rows.mean(0))
        weights = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.adam = torch.optim.Adam(weights, lr=4e-4)
        self.done = 0

    def step(self, x: Tensor) -> float:
        """One released update; gives the loss."""
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        best = pre.topk(self.k, dim=1)
        code = torch.zeros_like(pre).scatter(1, best.indices, best.values)
        error = code @ self.W_dec + self.b_dec - x
        loss = error.square().mean() / (x - x.mean(0)).square().mean()
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient = self.W_dec.grad
            assert gradient is not None
            gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.done += 1
        self.adam.param_groups[0]["lr"] = 4e-4 * min(1.0, (self.done + 1) / 500)
        self.adam.step()
        return loss.item()


def structured(rows: int, d: int) -> Tensor:
    """Rows made of 64 directions, a few strong in each, plus noise."""
    draw = torch.Generator().manual_seed(0)
    strengths = torch.rand(rows, 64, generator=draw) * (torch.rand(rows, 64, generator=draw) < 0.1)
    directions = torch.randn(64, d, generator=draw)
    return strengths @ directions + 0.1 * torch.randn(rows, d, generator=draw)


def sparse_step(arguments: argparse.Namespace, rows: Tensor, batch: int, moving: bool) -> Callable:
    model = KSparseAutoencoder(arguments.d, arguments.n, arguments.k, "as_code")
    settings = TrainSettings(steps=10**9, batch_size=batch)
    loop = train(model, rows, settings)
    state = next(loop).state
    if moving:
        state.moments.last.fill_(1)
    return lambda: next(loop)


def dense_step(arguments: argparse.Namespace, rows: Tensor, batch: int) -> Callable:
    dense = DenseStep(arguments.d, arguments.n, arguments.k, rows)
    order = torch.Generator().manual_seed(1)

    def step() -> None:
        dense.step(rows[torch.randint(len(rows), (batch,), generator=order)])

    return step


def timed(step: Callable[[], Any]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(arguments: argparse.Namespace, rows: Tensor, batch: int) -> dict[str, Any]:
    """Interleaved rounds of dense, sparse, and sparse with every row moving."""
    makers = {
        "dense": lambda: dense_step(arguments, rows, batch),
        "sparse": lambda: sparse_step(arguments, rows, batch, moving=False),
        "sparse, all rows moving": lambda: sparse_step(arguments, rows, batch, moving=True),
    }
    steps = {name: make() for name, make in makers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for index in range(arguments.rounds + 1):
        for name, step in steps.items():
            taken = timed(step)
            if index:
                times[name].append(taken)
    result: dict[str, Any] = {"batch": batch}
    for name, taken in times.items():
        wall, processor = (median(column) for column in zip(*taken, strict=True))
        pairs = zip(times["dense"], taken, strict=True)
        result[name] = {
            "seconds": round(wall, 4),
            "processor_seconds": round(processor, 4),
            "samples_per_second": round(batch / wall, 1),
            "times_dense": round(median(dense[0] / own[0] for dense, own in pairs), 2),
        }
    return result


def memory(arguments: argparse.Namespace, variant: str, batch: int) -> float:
    """Peak resident GiB of a fresh process that takes three steps of one variant."""
    command = [sys.executable, __file__, "--memory-of", variant, "--batches", str(batch)]
    command += ["--d", str(arguments.d), "--n", str(arguments.n), "--k", str(arguments.k)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def memory_of(arguments: argparse.Namespace, rows: Tensor) -> float:
    batch = arguments.batches[0]
    if arguments.memory_of == "dense":
        step = dense_step(arguments, rows, batch)
    else:
        step = sparse_step(arguments, rows, batch, moving=True)
    for _ in range(3):
        step()
    # Not getrusage: its peak is handed down from the process that started this one.
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024 / GIB


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=7349)
    parser.add_argument("--d", type=int, default=1280)
    parser.add_argument("--n", type=int, default=81_920)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--memory-of", choices=["dense", "sparse"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    rows = structured(arguments.rows, arguments.d)
    if arguments.memory_of:
        print(memory_of(arguments, rows))
        return
    size = 2 * arguments.d * arguments.n + arguments.d + arguments.n
    report: dict[str, Any] = {
        "d": arguments.d,
        "n": arguments.n,
        "k": arguments.k,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "load": [],
        "allowed_gib": round(1.2 * 16 * size / GIB, 2),
        "batches": [],
    }
    for batch in arguments.batches:
        report["load"].append(round(os.getloadavg()[0], 1))
        result = compare(arguments, rows, batch)
        for variant in ("dense", "sparse"):
            result[variant]["peak_gib"] = round(memory(arguments, variant, batch), 2)
        report["batches"].append(result)
        print(f"batch {batch}", flush=True)
        for name, found in result.items():
            if isinstance(found, dict):
                print("  " + f"{name:<24}" + "  ".join(f"{k} {v}" for k, v in found.items()))
    print(f"allowed: {report['allowed_gib']} GiB (parameters, gradients, moments and 20 %)")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
