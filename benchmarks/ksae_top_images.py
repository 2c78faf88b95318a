"""The top 10 images of every latent: streamed, as `revelio gallery` finds them, against one dense matrix.

    python benchmarks/ksae_top_images.py --json ksae_top_images.json

By TopK codes (mode `fixed`): `sparse` streams them, `dense codes` writes them into one matrix (images n). By
ReLU of the pre-activations, as released: `streamed`; `dense` is what the released code does, the whole
forward for all images at once, counts and means, then `topk` of the transposed matrix; `product` leaves out
all but the encoder's product and the `topk`: it counts nothing, and no float32 way can go much below it.
Each runs in a process of its own, which gives its peak memory above the inputs; then results are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ksae_dense import structured
from torch import Tensor

from revelio.analysis.config import TopImagesConfig
from revelio.analysis.top_images import top_images
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder

GIB = 2**30


class Rows:
    """Rows in memory that are read as a store is."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.row_shape, self.labels, self.classes = rows, (rows.shape[1],), None, ()
        self.manifest: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int):
        """(start, rows) of consecutive batches."""
        for start in range(0, len(self.rows), size):
            yield start, self.rows[start : start + size]


def dense(model: KSparseAutoencoder, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """As released: forward, ReLU, counts and means of all latents, then the largest of each."""
    with torch.inference_mode():
        codes = model.preactivations(rows)
        kept = codes.topk(model.k, dim=1)
        sparse = torch.zeros_like(codes).scatter_(1, kept.indices, kept.values)
        _ = sparse @ model.W_dec + model.b_dec
        del sparse, kept
        codes = torch.relu(codes)
        _ = codes.sum(0) / (codes > 0).sum(0)
        best = codes.T.contiguous().topk(m, dim=1)
    return best.values, best.indices


def dense_codes(model: KSparseAutoencoder, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """TopK codes of all images in one matrix, counts and means, then the largest of each latent."""
    with torch.inference_mode():
        codes = model.preactivations(rows)
        kept = codes.topk(model.k, dim=1)
        codes = torch.zeros_like(codes).scatter_(1, kept.indices, kept.values.relu())
        _ = codes.sum(0) / (codes > 0).sum(0)
        best = codes.T.contiguous().topk(m, dim=1)
    return best.values, best.indices


def sparse(model: KSparseAutoencoder, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    store: Any = Rows(rows)
    found = top_images(model, store, TopImagesConfig(m=m))
    return found.values, found.indices


def product(model: KSparseAutoencoder, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The encoder's product and the largest of each latent, nothing else."""
    with torch.inference_mode():
        best = torch.relu(model.preactivations(rows)).T.contiguous().topk(m, dim=1)
    return best.values, best.indices


def streamed(model: KSparseAutoencoder, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    store: Any = Rows(rows)
    found = top_images(model, store, TopImagesConfig(m=m, codes="dense"))
    return found.values, found.indices


WAYS = {
    "sparse": sparse,
    "dense codes": dense_codes,
    "streamed": streamed,
    "dense": dense,
    "product": product,
}


def one(arguments: argparse.Namespace) -> None:
    """Run one of the two ways and save what it found and cost."""
    rows = structured(arguments.rows, arguments.d)
    model = KSparseAutoencoder(arguments.d, arguments.n)
    if arguments.way in ("sparse", "streamed"):
        model.kernel = fastest_kernel(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.W_enc.normal_(generator=draw)
    before = peak()
    wall, processor = time.perf_counter(), time.process_time()
    way = WAYS[arguments.way]
    values, indices = way(model, rows, arguments.m)
    cost = {"seconds": round(time.perf_counter() - wall, 2)}
    cost["processor_seconds"] = round(time.process_time() - processor, 2)
    cost["gib_above_inputs"] = round(peak() - before, 2)
    torch.save({"values": values, "indices": indices, "cost": cost}, arguments.out)


def peak() -> float:
    """This process's peak resident memory so far, GiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / GIB


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            out = Path(folder) / way
            command = [sys.executable, __file__, "--way", way, "--out", str(out)]
            for name in ("rows", "d", "n", "m"):
                command += [f"--{name}", str(getattr(arguments, name))]
            subprocess.run(command, check=True)
            found[way] = torch.load(out, weights_only=True)
    costs = {way: result["cost"] for way, result in found.items()}
    report = {"rows": arguments.rows, "d": arguments.d, "n": arguments.n, "m": arguments.m}
    report |= costs | {"load": round(os.getloadavg()[0], 1)}
    for own, other in (("sparse", "dense codes"), ("streamed", "dense")):
        a, b = found[own], found[other]
        times = costs[other]["seconds"] / costs[own]["seconds"]
        report[f"{own}, times"] = round(times, 2)
        report[f"{own}, largest difference"] = float((a["values"] - b["values"]).abs().max())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    for name, value in {"rows": 7349, "d": 1280, "n": 81_920, "m": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        one(arguments)
        return
    report = compare(arguments)
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
