"""Cost of a k-SAE training step on one CUDA device against the released dense step and public packages.

    python benchmarks/ksae_cuda.py --json ksae_cuda.json
    python benchmarks/ksae_cuda.py --batches 1024 --rounds 20

All train on the same structured rows (64 directions plus noise), which lie on the device; steps are
timed by CUDA events, blocks of steps of the variants taking turns. `dense` is the released step with
Adam's fused form, in float32, with TF32 products, and under bfloat16 autocast; so are sparsify, SAELens,
dictionary_learning, flex-sae and flash-sae (`ksae_peers.py`) where they are installed; those that are not
are named. Peak memory is PyTorch's own count. The parts of our step are the profiler's kernel times; a step
is also taken while PyTorch looks for waits. The seconds of the first step, in which Triton compiles what it
has not kept from before, are told apart. A batch for whose steps the free memory is too little is named and
left out; if that were all of them, a smaller one is taken.
"""

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ksae_dense import DenseStep, structured
from ksae_peers import FORMATS, PEERS, Setup, Step, installed, pick, tf32
from torch import Tensor

from revelio.sae.config import TrainConfig
from revelio.sae.kernels.base import Kernel
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train

GIB = 2**30


def own_step(arguments: argparse.Namespace, rows: Tensor, batch: int, kernel: Kernel) -> Step:
    """A k-SAE of ours in mode ``as_code``, the released step's mathematics."""
    model = KSparseAutoencoder(arguments.d, arguments.n, arguments.k, "as_code").to(rows.device)
    settings = TrainConfig(steps=10**9, batch_size=batch)
    loop = train(model, Endless(rows, batch), settings, kernel=kernel)
    return lambda: next(loop)


class Endless:
    """Batches drawn on the device, so that no variant waits for the host."""

    def __init__(self, rows: Tensor, batch: int) -> None:
        self.rows, self.batch = rows, batch

    def epoch(self, index: int) -> Any:
        """A long epoch of random batches."""
        order = torch.Generator(self.rows.device).manual_seed(index)
        for _ in range(10**6):
            yield pick(self.rows, self.batch, order)


def dense_step(arguments: argparse.Namespace, rows: Tensor, batch: int, how: str) -> Step:
    """The released step, with fused Adam and a loss that stays on the device."""
    step = DenseStep(arguments.d, arguments.n, arguments.k, rows.cpu(), device=rows.device)
    order = torch.Generator(rows.device).manual_seed(1)

    def once() -> None:
        with tf32(how == "tf32"), torch.autocast("cuda", torch.bfloat16, enabled=how == "bf16"):
            step.step(pick(rows, batch, order))

    return once


def variants(
    arguments: argparse.Namespace, rows: Tensor, batch: int, own: Kernel
) -> dict[str, Any]:
    """How to make each variant's step; ours first, with its kernel."""
    from revelio.sae.kernels.cuda import CudaKernel

    made: dict[str, Any] = {
        "revelio": lambda: own_step(arguments, rows, batch, own),
        "revelio, selection after the product": lambda: own_step(
            arguments, rows, batch, CudaKernel("after")
        ),
        "revelio, selection within the product": lambda: own_step(
            arguments, rows, batch, CudaKernel("within")
        ),
        "revelio, PyTorch kernel": lambda: own_step(arguments, rows, batch, SparseKernel()),
    }
    for how in FORMATS:
        made[f"dense {how}"] = lambda how=how: dense_step(arguments, rows, batch, how)
        setup = Setup(arguments.d, arguments.n, arguments.k, rows, batch, how)
        for name in installed():
            made[f"{name} {how}"] = lambda setup=setup, make=PEERS[name][1]: make(setup)
    return made


def timed(step: Step, steps: int) -> float:
    """Milliseconds a step."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps


def needed(arguments: argparse.Namespace, batch: int) -> int:
    """Bytes that a batch takes, roughly: our k-SAE, a dense one with gradients, and its codes six times."""
    parameters = 2 * arguments.d * arguments.n
    ours, dense = 14 * parameters + 2**29, 16 * parameters
    return ours + dense + 6 * 4 * batch * arguments.n


def fitting(arguments: argparse.Namespace, free: int) -> list[int]:
    """The batches that so much free memory holds, or else the largest half, quarter, ... of the least."""
    fits = [batch for batch in arguments.batches if needed(arguments, batch) <= free]
    batch = min(arguments.batches)
    while not fits and batch > 1:
        batch //= 2
        fits = [batch] if needed(arguments, batch) <= free else []
    return fits


def first_step(step: Step) -> float:
    """Seconds of a step that may compile first."""
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return round(time.perf_counter() - began, 2)


def compiled(arguments: argparse.Namespace, rows: Tensor, batch: int) -> dict[str, float]:
    """Seconds of a first step, and of the second."""
    step = variants(arguments, rows, batch, cuda_kernel())["revelio"]()
    return {"first_step_seconds": first_step(step), "second_step_seconds": first_step(step)}


def measure(arguments: argparse.Namespace, rows: Tensor, batch: int) -> dict[str, Any]:
    """Each of the others in turn with ours; at most two in memory at a time."""
    kernel = cuda_kernel()
    made = variants(arguments, rows, batch, kernel)
    if arguments.variants:
        made = {
            name: make for name, make in made.items() if name in ("revelio", *arguments.variants)
        }
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = made.pop("revelio")()
    first = first_step(ours)
    timed(ours, arguments.warmup)
    result: dict[str, Any] = {"batch": batch}
    own: dict[str, Any] = {"first_step_seconds": first}
    own |= {"peak_gib": round((torch.cuda.max_memory_allocated() - before) / GIB, 3)}
    torch.cuda.reset_peak_memory_stats()
    timed(ours, 5)
    # Without the trial of both selections, which the peak before may be of.
    own |= {"peak_of_later_steps_gib": round((torch.cuda.max_memory_allocated() - before) / GIB, 3)}
    own |= {"selections_ms": selections(kernel)}
    own |= {"parts_ms": parts(ours), "waits_for_the_device": synchronises(ours)}
    taken: list[float] = []
    for name, make in made.items():
        try:
            pairs, result[name] = against(ours, make, arguments.rounds)
            taken += [pair[1] for pair in pairs]
        except Exception as error:  # a part that fails is named, and the others go on
            result[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        # Of one that failed, too: its weights would stand beside the next one's.
        gc.collect()
        torch.cuda.empty_cache()
    # Where none of the others could be timed, there are no turns to take ours from.
    taken = taken or [timed(ours, 5) for _ in range(arguments.rounds)]
    result["revelio"] = own | {"ms": round(median(taken), 3)}
    result["revelio"]["samples_per_second"] = round(1000 * batch / median(taken))
    result["product alone, ms"] = products(arguments, rows[:1].expand(batch, -1).contiguous())
    return result


def cuda_kernel() -> Any:
    """The kernel that is measured."""
    from revelio.sae.kernels.cuda import CudaKernel

    return CudaKernel()


def selections(kernel: Any) -> dict[str, float]:
    """Milliseconds of a batch's best latents each way, as the kernel's trial found them."""
    return {
        "after the product" if tile is None else f"within, {tile.rows} x {tile.columns}": round(
            took, 3
        )
        for times in kernel.nomination.milliseconds.values()
        for tile, took in times.items()
    }


def against(
    ours: Step, make: Callable[[], Step], rounds: int
) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Milliseconds of another's steps and of ours, in turn; and what they come to."""
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    timed(step, 5)
    peak = torch.cuda.max_memory_allocated() - held
    pairs = [(timed(step, 5), timed(ours, 5)) for _ in range(rounds)]
    return pairs, {
        "ms": round(median(pair[0] for pair in pairs), 3),
        "revelio_is_times_faster": round(median(a / b for a, b in pairs), 2),
        "peak_gib": round(peak / GIB, 3),
    }


def parts(step: Step, steps: int = 10) -> dict[str, float]:
    """Milliseconds a step of the most expensive CUDA kernels, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:14]
    return {event.key[:60]: round(event.device_time_total / 1000 / steps, 4) for event in found}


def synchronises(step: Step) -> str:
    """What PyTorch warns of when a step waits for the device; empty: it does not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    said = [
        f"{each.filename}:{each.lineno}" for each in caught if "called a sync" in str(each.message)
    ]
    return " ".join(said)


def products(arguments: argparse.Namespace, x: Tensor) -> dict[str, float]:
    """The encoder's product alone, by cuBLAS."""
    found = {}
    out_rows = min(len(x), 2048)
    for name, dtype, rounds in (
        ("float16", torch.float16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = rounds
        weight = torch.randn(arguments.n, x.shape[1], device=x.device).to(dtype)
        part = torch.randn(out_rows, x.shape[1], device=x.device).to(dtype)
        out = torch.empty(out_rows, arguments.n, device=x.device, dtype=dtype)
        run = lambda p=part, w=weight, o=out: torch.mm(p, w.T, out=o)  # noqa: E731
        timed(run, 3)
        found[name] = round(timed(run, 20) * len(x) / out_rows, 3)
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--warmup", type=int, default=400, help="our steps before the first timed one"
    )
    parser.add_argument("--variants", nargs="+", help="only these of the others")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="take one step at the smallest batch and say how long",
    )
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--d", type=int, default=1280)
    parser.add_argument("--n", type=int, default=81_920)
    parser.add_argument("--k", type=int, default=32)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if not torch.cuda.is_available():
        raise SystemExit(
            "ksae_cuda.py: no CUDA device is visible; benchmarks/ksae_step.py is for a CPU"
        )
    rows = structured(arguments.rows, arguments.d).cuda()
    parameters = 2 * arguments.d * arguments.n + arguments.d + arguments.n
    report: dict[str, Any] = {"d": arguments.d, "n": arguments.n, "k": arguments.k}
    report |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    if arguments.compile_only:
        report |= compiled(arguments, rows, min(arguments.batches))
        print(json.dumps(report), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
        return
    report |= {"warmup": arguments.warmup}
    report["not_installed"] = [name for name in PEERS if name not in installed()]
    print(f"not installed: {', '.join(report['not_installed']) or 'none'}", flush=True)
    report |= {"parameters_and_moments_gib": round(12 * parameters / GIB, 3), "batches": []}
    free = torch.cuda.mem_get_info()[0]
    sizes = fitting(arguments, free)
    report["left_out"] = [
        f"batch {batch}: it takes {needed(arguments, batch) / GIB:.1f} GiB, {free / GIB:.1f} are free"
        for batch in arguments.batches
        if batch not in sizes
    ]
    if not sizes:
        raise SystemExit(f"ksae_cuda.py: {report['left_out'][0]}: give a smaller --n")
    for text in report["left_out"]:
        print(text, flush=True)
    for batch in sizes:
        try:
            result = measure(arguments, rows, batch)
        except Exception as error:  # the other batches go on
            result = {"batch": batch, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
        report["batches"].append(result)
        print(f"batch {batch}", flush=True)
        for name, found in result.items():
            print(f"  {name:<24} {json.dumps(found)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
