"""k-SAEs of cells: training against pooled rows of the same sizes, and heat maps against dense codes.

    python benchmarks/cells.py --json cells.json
    python benchmarks/cells.py --gb 30 --d 1280 --side 32 --expansion 64 --folder /data/tmp
    python benchmarks/cells.py --gb 10 --only stores --folder /data/tmp   # kept; then, on a quiet machine,
    python benchmarks/cells.py --gb 10 --only training --stores /data/tmp --cap 2 --rounds 1

Training: a store of vectors and a store of whole grids with as many cells, both of `--gb` and both streamed
(any size that fits the disk: nothing is held but the shuffling buffer), the same k-SAE for the same steps, in
one process that takes turns of `--turn` steps, so that what else the machine does falls on both; the ratio of
two turns that follow each other, its mean over pairs (of logarithms) with a 95 % t interval. Alone, a process
each: `reading` is the loader for `--read` batches, then one turn, for the peak memory. With `--cap` no
process may hold more data than so many GiB (RLIMIT_DATA), which a store larger than that shows to be
streamed; the system's cache of its files is dropped before. Heat maps: `--latents` latents on `--images`
images, some at a time; `dense` takes the pre-activations of all latents at all cells, keeps the k largest by
`topk`, scatters them into a dense code and picks the latents out of it; `ours` is `encode_grid(...,
latents=...).maps(...)`, in turns of a process each; results of the two ways are compared. Both come in rows
or images a second and a second of processor time: on a machine that others use too, only the latter is the
program's own.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import exp, log
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from ksae_dense import structured
from torch import Tensor

from revelio.activations.format import write_shard
from revelio.activations.manifest import write_manifest
from revelio.activations.store import ActivationStore
from revelio.analysis.cells import encode_grid
from revelio.pipelines.sae_rows import StoreRows
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import Shuffled
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import train
from revelio.stats import mean95

GIB = 2**30
TIMES = ("second", "processor_second")
SHARD_BYTES = 2**26


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    d: int
    side: int
    expansion: int
    k: int
    batch: int
    steps: int
    turn: int
    read: int
    gb: float
    images: int
    latents: int
    threads: int
    cap: float

    @property
    def cells(self) -> int:
        """Cells an image."""
        return self.side**2

    @property
    def grids(self) -> int:
        """Images of the store of grids."""
        return max(2, int(self.gb * 1e9 / (4 * self.d * self.cells)))


def make_store(folder: Path, sizes: Sizes, kind: str) -> Path:
    """A store of so many cells, as grids or as vectors; its rows repeat a block, which no loader can tell."""
    block = structured(max(4096, sizes.cells), sizes.d)
    path, rows = folder / kind, sizes.grids * sizes.cells
    each = sizes.cells if kind == "cells" else 1
    count = rows // each
    size = max(1, SHARD_BYTES // (4 * sizes.d * each))
    shards = range(0, count, size)
    for number, start in enumerate(shards):
        images = min(size, count - start)
        picks = torch.arange(start * each, (start + images) * each) % len(block)
        part = block[picks]
        if kind == "cells":
            part = part.view(images, sizes.cells, sizes.d).transpose(1, 2).contiguous()
            part = part.view(images, sizes.d, sizes.side, sizes.side)
        write_shard(path, number, part, [f"{start + i}" for i in range(images)])
    write_manifest(path, {"layer": kind, "model": "none"}, len(shards))
    return path


def rows_of(path: Path, kind: str) -> StoreRows:
    """The store's rows as training reads them; hashes are not looked at, which is done once a file."""
    store = ActivationStore.open(path, verify=False)
    return StoreRows(store, torch.arange(store.images), cells=kind == "cells")


def alone(path: Path, kind: str, sizes: Sizes) -> dict[str, float]:
    """Rows a second of reading alone, and the memory that reading and training take."""
    _begin(sizes)
    _forget(path)
    batches = Shuffled(rows_of(path, kind), sizes.batch, workers=1)
    clock = Clock()
    read = sum(len(batch) for batch in islice(batches.epoch(0), sizes.read))
    reading = clock.rates("reading_rows", read)
    for _ in islice(_loop(path, kind, sizes), sizes.turn):
        pass
    return {**reading, "peak_gib": _peak()}


def side_by_side(paths: dict[str, Path], sizes: Sizes) -> dict[str, Any]:
    """Rows a second of training from each streamed store, in turns of some steps."""
    _begin(sizes)
    for path in paths.values():
        _forget(path)
    loops = {kind: _loop(path, kind, sizes) for kind, path in paths.items()}
    rates: dict[str, list[dict[str, float]]] = {kind: [] for kind in paths}
    for number in range(-1, sizes.steps // sizes.turn):
        # Which one is first changes, so that a machine that slows down favors neither.
        for kind in sorted(loops, reverse=bool(number % 2)):
            clock = Clock()
            for _ in islice(loops[kind], sizes.turn):
                pass
            if number >= 0:
                rates[kind].append(clock.rates("rows", sizes.turn * sizes.batch))
        print(number, *(f"{kind} {some[-1:]}" for kind, some in rates.items()), flush=True)
    names = [f"per_{time}" for time in TIMES]
    return {
        "turns": rates,
        "cells_over_pooled": {
            name: _mean_ratio(*([turn[f"rows_{name}"] for turn in rates[kind]] for kind in paths))
            for name in names
        },
    }


def _mean_ratio(pooled: list[float], cells: list[float]) -> dict[str, Any]:
    """Of turns that follow each other, the second kind's rate over the first's."""
    logs = [log(b / a) for a, b in zip(pooled, cells, strict=True)]
    return {"mean": exp(mean(logs)), "interval": [exp(end) for end in mean95(logs)]}


def _loop(path: Path, kind: str, sizes: Sizes) -> Iterator[Any]:
    """Training without an end that a turn would meet."""
    batches = Shuffled(rows_of(path, kind), sizes.batch, workers=1)
    model = KSparseAutoencoder(sizes.d, sizes.expansion * sizes.d, sizes.k, seed=None)
    config = TrainConfig(steps=sizes.steps + 2 * sizes.turn, batch_size=sizes.batch)
    return train(model, _Begun(batches), config)


class Clock:
    """Seconds since it was made, of the wall's clock and of this process's own work."""

    def __init__(self) -> None:
        self.wall, self.own = time.perf_counter(), time.process_time()

    def rates(self, what: str, done: int) -> dict[str, float]:
        """How many were done in a second of either."""
        return {
            f"{what}_per_second": done / (time.perf_counter() - self.wall),
            f"{what}_per_processor_second": done / (time.process_time() - self.own),
        }


def _begin(sizes: Sizes) -> None:
    """The threads and the memory that the process may have."""
    torch.set_num_threads(sizes.threads)
    if sizes.cap:
        limit = int(sizes.cap * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _forget(path: Path) -> None:
    """Put the store out of the system's cache of files, so that it is read from the disk."""
    for shard in path.rglob("*.safetensors"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Begun:
    """Batches whose first epoch, which the start takes its numbers from, is short."""

    def __init__(self, batches: Shuffled) -> None:
        self.batches, self.asked = batches, 0

    def epoch(self, index: int) -> Iterator[Tensor]:
        """The epoch; the first two times only some batches of it."""
        self.asked += 1
        found = self.batches.epoch(index)
        yield from islice(found, 4) if self.asked <= 2 else found


def maps(way: str, sizes: Sizes) -> dict[str, Any]:
    """Images a second of heat maps, one way, and a sum to compare results by."""
    _begin(sizes)
    n = sizes.expansion * sizes.d
    model = KSparseAutoencoder(sizes.d, n, sizes.k)
    model.kernel = fastest_kernel(model)
    latents = torch.arange(0, n, max(1, n // sizes.latents))[: sizes.latents]
    size = max(1, 4096 // sizes.cells)
    rows = structured(size * sizes.cells, sizes.d)
    grids = rows.view(size, sizes.side, sizes.side, sizes.d).permute(0, 3, 1, 2).contiguous()
    run: Callable[[], Tensor] = {
        "ours": lambda: encode_grid(model, grids, latents=latents).maps(latents),
        "dense": lambda: _dense(model, grids, latents),
    }[way]
    found = run()
    clock, passes = Clock(), -(-sizes.images // size)
    for _ in range(passes):
        found = run()
    rates = clock.rates("images", passes * size)
    return {**rates, "peak_gib": _peak(), "sum": float(found.double().sum())}


@torch.no_grad()
def _dense(model: KSparseAutoencoder, grids: Tensor, latents: Tensor) -> Tensor:
    b, d, h, w = grids.shape
    codes = model.preactivations(grids.permute(0, 2, 3, 1).reshape(-1, d))
    kept = codes.topk(model.k, dim=1)
    dense = torch.zeros_like(codes).scatter_(1, kept.indices, kept.values.relu())
    return dense[:, latents].view(b, h * w, -1).transpose(1, 2).reshape(b, -1, h, w)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def in_turns(calls: dict[str, tuple[Any, ...]], rounds: int) -> dict[str, list[Any]]:
    """What each call gives in each round: what else the machine does falls on all of them."""
    found: dict[str, list[Any]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            found[name].append(apart(*call))
            print(f"round {number} {name}: {found[name][-1]}", flush=True)
    return found


def best_ratios(found: dict[str, list[Any]], ours: str, other: str, what: str) -> dict[str, float]:
    """Our best rate over the other's, in either time."""
    best = {
        (name, time): max(one[f"{what}_per_{time}"] for one in found[name])
        for name in (ours, other)
        for time in TIMES
    }
    return {f"per_{time}": best[ours, time] / best[other, time] for time in TIMES}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, default=640)
    parser.add_argument("--side", type=int, default=16, help="of the grids")
    parser.add_argument("--expansion", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=600, help="of each k-SAE")
    parser.add_argument("--turn", type=int, default=20, help="steps in a turn")
    parser.add_argument("--read", type=int, default=1000, help="batches that are only read")
    parser.add_argument("--gb", type=float, default=1.0, help="of each store")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--latents", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cap", type=float, default=0.0, help="GiB of data a process; 0: any")
    parser.add_argument("--only", choices=("stores", "training", "maps"), help="one part alone")
    parser.add_argument("--folder", type=Path, help="for the stores, which are removed in the end")
    parser.add_argument(
        "--stores", type=Path, help="the folder of an earlier call with --only stores"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    names = Sizes.__annotations__
    sizes = Sizes(**{name: getattr(options, name) for name in names})
    found: dict[str, Any] = {"sizes": vars(sizes)}
    kinds = ("pooled", "cells")
    if options.only == "stores":
        print(*(make_store(options.folder, sizes, kind) for kind in kinds), sep="\n")
        return
    if options.only != "maps":
        folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="cells-"))
        try:
            made = {kind: (options.stores or folder) / kind for kind in kinds}
            paths = (
                made
                if options.stores
                else {kind: make_store(folder, sizes, kind) for kind in kinds}
            )
            found |= apart(side_by_side, paths, sizes)
            calls = {kind: (alone, path, kind, sizes) for kind, path in paths.items()}
            found["alone"] = in_turns(calls, options.rounds)
        finally:
            shutil.rmtree(folder)
        found["reading"] = best_ratios(found["alone"], "cells", "pooled", "reading_rows")
        print(f"training on cells over pooled: {found['cells_over_pooled']}, {found['reading']}")
    if options.only != "training":
        calls = {way: (maps, way, sizes) for way in ("dense", "ours")}
        found["maps"] = of = in_turns(calls, options.rounds)
        sums = [of[way][0]["sum"] for way in of]
        assert abs(sums[0] - sums[1]) < 1e-3 * abs(sums[0])
        found["times_faster_than_dense"] = best_ratios(of, "ours", "dense", "images")
        print(f"heat maps over dense: {found['times_faster_than_dense']}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
