"""k-SAEs of cells: training against pooled rows of the same sizes, and heat maps against dense codes.

    python benchmarks/cells.py --json cells.json
    python benchmarks/cells.py --gb 30 --d 1280 --side 32 --expansion 64 --folder /data/tmp

Training: a store of vectors and a store of whole grids with as many cells, both of `--gb` and both streamed
(any size that fits the disk: nothing is held but the shuffling buffer), the same k-SAE for the same steps.
`reading` is the loader alone, over a whole epoch. Heat maps: `--latents` latents on `--images` images, some
at a time; `dense` takes the pre-activations of all latents at all cells, keeps the k largest by `topk`,
scatters them into a dense code and picks the latents out of it; `ours` is `encode_grid(...).maps(...)`. Each
part runs in a process of its own, which gives its peak memory; results of the two ways are compared.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
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

GIB = 2**30
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
    gb: float
    images: int
    latents: int
    threads: int

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


def training(path: Path, kind: str, sizes: Sizes) -> dict[str, float]:
    """Rows a second of training from a streamed store, and of reading alone."""
    torch.set_num_threads(sizes.threads)
    batches = Shuffled(rows_of(path, kind), sizes.batch, workers=1)
    began = time.perf_counter()
    read = sum(len(batch) for batch in batches.epoch(0))
    reading = read / (time.perf_counter() - began)
    model = KSparseAutoencoder(sizes.d, sizes.expansion * sizes.d, sizes.k, seed=None)
    loop = train(model, _Begun(batches), TrainConfig(steps=sizes.steps + 5, batch_size=sizes.batch))
    for _ in islice(loop, 5):
        pass
    began, rows = time.perf_counter(), 0
    for _ in loop:
        rows += sizes.batch
    return {
        "rows_per_second": rows / (time.perf_counter() - began),
        "reading_rows_per_second": reading,
        "peak_gib": _peak(),
    }


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
    torch.set_num_threads(sizes.threads)
    n = sizes.expansion * sizes.d
    model = KSparseAutoencoder(sizes.d, n, sizes.k)
    model.kernel = fastest_kernel(model)
    latents = torch.arange(0, n, max(1, n // sizes.latents))[: sizes.latents]
    size = max(1, 4096 // sizes.cells)
    rows = structured(size * sizes.cells, sizes.d)
    grids = rows.view(size, sizes.side, sizes.side, sizes.d).permute(0, 3, 1, 2).contiguous()
    run: Callable[[], Tensor] = {
        "ours": lambda: encode_grid(model, grids).maps(latents),
        "dense": lambda: _dense(model, grids, latents),
    }[way]
    found = run()
    before = _peak()
    began = time.perf_counter()
    for _ in range(-(-sizes.images // size)):
        found = run()
    seconds = time.perf_counter() - began
    images = -(-sizes.images // size) * size
    return {
        "images_per_second": images / seconds,
        "peak_gib": max(before, _peak()),
        "sum": float(found.double().sum()),
    }


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, default=640)
    parser.add_argument("--side", type=int, default=16, help="of the grids")
    parser.add_argument("--expansion", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=300, help="enough that reading counts")
    parser.add_argument("--gb", type=float, default=1.0, help="of each store")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--latents", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the stores, which are removed in the end")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    names = Sizes.__annotations__
    sizes = Sizes(**{name: getattr(options, name) for name in names})
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="cells-"))
    found: dict[str, Any] = {"sizes": vars(sizes), "training": {}, "maps": {}}
    try:
        paths = {kind: make_store(folder, sizes, kind) for kind in ("pooled", "cells")}
        for number in range(options.rounds):
            # Turns, so that what else the machine does falls on both.
            for kind, path in paths.items():
                found["training"].setdefault(kind, []).append(apart(training, path, kind, sizes))
                print(f"round {number} {kind}: {found['training'][kind][-1]}", flush=True)
    finally:
        shutil.rmtree(folder)
    for way in ("dense", "ours"):
        found["maps"][way] = apart(maps, way, sizes)
        print(f"{way}: {found['maps'][way]}", flush=True)
    best = {k: max(one["rows_per_second"] for one in v) for k, v in found["training"].items()}
    of = found["maps"]
    found["cells_over_pooled"] = best["cells"] / best["pooled"]
    found["times_faster_than_dense"] = (
        of["ours"]["images_per_second"] / of["dense"]["images_per_second"]
    )
    assert abs(of["ours"]["sum"] - of["dense"]["sum"]) < 1e-3 * abs(of["dense"]["sum"])
    print(
        f"training on cells: {found['cells_over_pooled']:.3f} of the pooled rows a second; heat maps "
        f"{found['times_faster_than_dense']:.1f} times as fast as dense, "
        f"peak {of['ours']['peak_gib']:.2f} GiB (dense {of['dense']['peak_gib']:.2f})"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
