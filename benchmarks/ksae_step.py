"""Cost of a k-SAE training step against a dense implementation of the released one, and against sparsify.

    python benchmarks/ksae_step.py --json ksae_step.json
    python benchmarks/ksae_step.py --batches 256 --rounds 3 --sparsify-python /path/to/its/python

Each takes steps in turn with the native kernel, on the same structured rows (64 directions plus noise);
medians of wall and processor time, and of the ratios of neighbouring steps, are printed. `native` and `torch`
are the two kernels as they come; `native, all rows moving` is the worst case, in which every latent's row is
updated. Peak memory is each variant's own process's. sparsify runs in an interpreter of its own.
What a step takes depends on what the k-SAE has learned: --trained 1500 trains the native one before, and says
what it multiplied with in the end. The others' steps cost the same at any time, but for the rows that move.
The instruction set that the native kernel multiplies with is printed; REVELIO_NATIVE=avx512 (say) caps it,
and nothing else. --held-to avx2 holds the native kernel, PyTorch and sparsify alike to what an older kind of
processor has, and its row says so. Where the native kernel nominates in int8, int16 is timed in turn with it.
On a machine that others share give --ratio by_processor_time, and --machine where its instruction set has a
row already: tables take the one and name the other.
With --json, other instruction sets and other batches measured earlier with the same sizes stay in the file.
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

# Threads that wait do not spin, here and in the peer's process: processor time counts work, also beside other
# work on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from ksae_dense import DenseStep, structured
from peaks import peaks_of_a_thread
from torch import Tensor

from revelio.sae.config import TrainConfig
from revelio.sae.kernels.build import instruction_set
from revelio.sae.kernels.select import choose_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train

GIB = 2**30
HERE = Path(__file__).parent
Times = tuple[float, float]

# Kinds of processors that a newer one can stand in for, and what holds whom to their instructions: the native
# kernel, whose AVX-512 needs VNNI; PyTorch's own loops; oneDNN; MKL. They are read when a process starts.
KINDS = {
    "avx2": ("avx2-int8", "avx2", "AVX2", "AVX2"),
    "avx512-without-vnni": ("avx2-int8", "avx512", "AVX512_CORE", "AVX512"),
}
HOLD = ("REVELIO_NATIVE", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
# Of the sets that nominate in int8, those that multiply the same in int16.
INT16 = {"avx2-int8": "avx2", "avx-vnni-int8": "avx2", "avx512-int8": "avx512"}


class TimedKernel:
    """A kernel that adds up the wall and the processor time of its parts."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds, self.processor = inner, {}, {}

    def __getattr__(self, name: str) -> Callable:
        part = getattr(self.inner, name)

        def call(*arguments: Any) -> Any:
            began, processor = time.perf_counter(), time.process_time()
            result = part(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            taken = time.process_time() - processor
            self.processor[name] = self.processor.get(name, 0.0) + taken
            return result

        return call


class OwnStep:
    """A k-SAE of ours that trains in `as_code`, with one of the kernels."""

    def __init__(
        self, arguments: argparse.Namespace, rows: Tensor, batch: int, name: Any, allowed: str = ""
    ) -> None:
        before = os.environ.get("REVELIO_NATIVE", "")
        os.environ["REVELIO_NATIVE"] = allowed or before
        self.kernel = TimedKernel(choose_kernel(name).kernel)
        os.environ["REVELIO_NATIVE"] = before
        model = KSparseAutoencoder(arguments.d, arguments.n, arguments.k, "as_code")
        settings = TrainConfig(steps=10**9, batch_size=batch)
        whole = rows[: len(rows) // batch * batch]  # no smaller batch at an epoch's end
        self.loop: Any = train(model, whole, settings, kernel=self.kernel)  # pyright: ignore
        self.state = next(self.loop).state
        for number in range(arguments.trained if name == "native" else 0):
            if number % 100 == 0:
                print(f"  step {number} of {arguments.trained} before the comparison", flush=True)
            next(self.loop)

    def __call__(self) -> Times:
        """A step as it comes."""
        return timed(lambda: next(self.loop))

    def moving(self) -> Times:
        """A step in which every row moves."""
        self.state.moments.last.clamp_(min=1)
        return self()


class SparsifyStep:
    """Steps of the peer, in its own process."""

    def __init__(self, arguments: argparse.Namespace, batch: int) -> None:
        sizes = (arguments.d, arguments.n, arguments.k, batch, arguments.rows)
        command = [arguments.sparsify_python, str(HERE / "ksae_sparsify.py"), *map(str, sizes)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self) -> Times:
        """A step; the time that the peer itself took."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        wall, processor = self.process.stdout.readline().split()
        return float(wall), float(processor)

    def close(self) -> float:
        """End the process; gives its peak memory in GiB."""
        return int(self.process.communicate()[0]) * 1024 / GIB


def timed(step: Callable[[], Any]) -> Times:
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


def dense_step(arguments: argparse.Namespace, rows: Tensor, batch: int) -> Callable[[], Times]:
    dense = DenseStep(arguments.d, arguments.n, arguments.k, rows)
    order = torch.Generator().manual_seed(1)
    return lambda: timed(
        lambda: dense.step(rows[torch.randint(len(rows), (batch,), generator=order)])
    )


def compare(arguments: argparse.Namespace, rows: Tensor, batch: int) -> dict[str, Any]:
    """Each of the others in turn with the native step; one of them in memory at a time."""
    native = OwnStep(arguments, rows, batch, "native")
    others: dict[str, Callable[[], Callable[[], Times]]] = {
        "dense": lambda: dense_step(arguments, rows, batch),
        "torch": lambda: OwnStep(arguments, rows, batch, "torch"),
        "float32 product alone": lambda: product(rows[:batch], arguments.n),
    }
    if instruction_set() in INT16:
        int16 = INT16[instruction_set()]
        others["native in int16"] = lambda: OwnStep(arguments, rows, batch, "native", int16)
    if arguments.sparsify_python:
        others["sparsify"] = lambda: SparsifyStep(arguments, batch)
    result: dict[str, Any] = {"batch": batch}
    own: list[Times] = []
    native()
    native.kernel.seconds.clear()
    native.kernel.processor.clear()
    for name, make in others.items():
        step, beside = make(), native
        if (
            name == "native in int16"
        ):  # rows move more and more: beside one that has learned as little
            beside = OwnStep(arguments, rows, batch, "native")
            beside()
        step()
        pairs = [(step(), beside()) for _ in range(arguments.rounds)]
        own += [pair[1] for pair in pairs if beside is native]
        result[name] = summary(batch, [pair[0] for pair in pairs]) | ratios(pairs)
        if isinstance(step, OwnStep) and name != "torch":
            result[name]["multiplied_with"] = step.kernel.inner.instructions
        if isinstance(step, SparsifyStep):
            result[name]["peak_gib"] = round(step.close(), 2)
        del step, beside
    parts, processor = (
        {name: round(s / len(own), 4) for name, s in each.items()}
        for each in (native.kernel.seconds, native.kernel.processor)
    )
    used = native.kernel.inner.instructions
    result["native"] = summary(batch, own) | {"parts": parts, "multiplied_with": used}
    result["native"]["processor_parts"] = processor
    result["native, all rows moving"] = summary(
        batch, [native.moving() for _ in range(arguments.rounds)]
    )
    return result


def summary(batch: int, taken: list[Times]) -> dict[str, Any]:
    wall, processor = (median(column) for column in zip(*taken, strict=True))
    return {
        "seconds": round(wall, 4),
        "processor_seconds": round(processor, 4),
        "samples_per_second": round(batch / wall, 1),
    }


def ratios(pairs: list[tuple[Times, Times]]) -> dict[str, float]:
    """How many times faster the native step is: medians over neighbouring steps."""
    wall, processor = (median(other[i] / own[i] for other, own in pairs) for i in (0, 1))
    return {"native_is_times_faster": round(wall, 2), "by_processor_time": round(processor, 2)}


def product(x: Tensor, n: int) -> Callable[[], Times]:
    """The floor of a plain step: the encoder's float32 product alone, by PyTorch."""
    weight, out = torch.randn(n, x.shape[1]), torch.empty(len(x), n)
    return lambda: timed(lambda: torch.mm(x, weight.T, out=out))


def memory(arguments: argparse.Namespace, variant: str, batch: int) -> float:
    """Peak resident GiB of a fresh process that takes three steps of one variant."""
    command = [sys.executable, __file__, "--memory-of", variant, "--batches", str(batch)]
    command += ["--d", str(arguments.d), "--n", str(arguments.n), "--k", str(arguments.k)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def memory_of(arguments: argparse.Namespace, rows: Tensor) -> float:
    batch, name = arguments.batches[0], arguments.memory_of
    dense = name == "dense"
    step = (
        dense_step(arguments, rows, batch)
        if dense
        else OwnStep(arguments, rows, batch, name).moving
    )
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
    parser.add_argument(
        "--trained", type=int, default=0, help="steps before the native one is timed"
    )
    parser.add_argument("--sparsify-python", help="an interpreter that has eai-sparsify")
    ratios = ("native_is_times_faster", "by_processor_time")
    parser.add_argument("--ratio", choices=ratios, default=ratios[0], help="which one tables take")
    parser.add_argument("--machine", default="", help="stands beside the instruction set")
    parser.add_argument(
        "--held-to", choices=list(KINDS), help="a kind of processor to stand in for"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--memory-of", choices=["dense", "native", "torch"], help=argparse.SUPPRESS)
    return parser.parse_args()


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the report, keeping what else an earlier one with the same sizes has."""
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if all(earlier.get(key) == report[key] for key in ("d", "n", "k", "trained_steps")):
        machines = dict(earlier["machines"])
        for name, machine in report["machines"].items():
            batches = {one["batch"]: one for one in machines.get(name, {"batches": []})["batches"]}
            batches |= {one["batch"]: one for one in machine["batches"]}
            machines[name] = machine | {"batches": [batches[size] for size in sorted(batches)]}
        report = report | {"machines": machines}
    path.write_text(json.dumps(report, indent=2) + "\n")


def hold(kind: str) -> None:
    """Start anew with the instructions that such a processor has, unless this process was."""
    wanted = dict(zip(HOLD, KINDS[kind], strict=True))
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    found = instruction_set(), torch.backends.cpu.get_cpu_capability().lower()
    if found != KINDS[kind][:2]:
        sys.exit(f"ksae_step.py: this processor cannot stand in for {kind}: it has {found}")


def about_machine(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What the report calls this machine, and what holds for all batches."""
    machine: dict[str, Any] = {"torch": torch.__version__, "batches": []}
    if arguments.ratio != "native_is_times_faster":
        machine["ratio"] = arguments.ratio
    if arguments.held_to:
        machine["held_to"] = arguments.held_to
        machine["held_by"] = {name: os.environ[name] for name in HOLD}
    machine["torch_capability"] = torch.backends.cpu.get_cpu_capability()
    machine["peaks_of_a_thread"] = peaks_of_a_thread(wide=instruction_set().startswith("avx512"))
    held = arguments.held_to and f"held to {arguments.held_to}"
    return ", ".join(filter(None, (instruction_set(), arguments.machine, held))), machine


def main() -> None:
    arguments = parse()
    if arguments.held_to:
        hold(arguments.held_to)
    rows = structured(arguments.rows, arguments.d)
    if arguments.memory_of:
        print(memory_of(arguments, rows))
        return
    size = 2 * arguments.d * arguments.n + arguments.d + arguments.n
    report: dict[str, Any] = {"d": arguments.d, "n": arguments.n, "k": arguments.k}
    report["trained_steps"] = arguments.trained
    report["allowed_gib"] = round(1.2 * 16 * size / GIB, 2)
    name, machine = about_machine(arguments)
    report["machines"] = {name: machine}
    print(f"native kernel on {instruction_set()}, PyTorch on {machine['torch_capability']}")
    for batch in arguments.batches:
        load = round(os.getloadavg()[0], 1)
        result = compare(arguments, rows, batch)
        result |= {"load": load, "threads": torch.get_num_threads(), "rounds": arguments.rounds}
        for variant in () if arguments.no_memory else ("dense", "native", "torch"):
            result[variant]["peak_gib"] = round(memory(arguments, variant, batch), 2)
        machine["batches"].append(result)
        print(f"batch {batch}, load {load}", flush=True)
        for name, found in result.items():
            if isinstance(found, dict):
                print("  " + f"{name:<24}" + "  ".join(f"{k} {v}" for k, v in found.items()))
        if arguments.json:
            write(arguments.json, report)
    print(f"allowed: {report['allowed_gib']} GiB (parameters, gradients, moments and 20 %)")


if __name__ == "__main__":
    main()
