"""EleutherAI's sparsify, a step at a time: run by its own interpreter from ``benchmarks/ksae_step.py``.

Reads a line for every step that is wanted and answers with its wall and processor seconds; its last word is
its peak memory. Settings as in its trainer: fused encoder, unit decoder norm, gradient projection, no AuxK;
Adam with ``fused=True``, the fastest of its optimisers' kin on a CPU.
"""

import os
import sys
import time
from pathlib import Path

import torch

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


def main() -> None:
    d, n, k, batch, rows = map(int, sys.argv[1:])
    answer, sys.stdout = sys.stdout, sys.stderr  # the package prints
    from ksae_dense import structured
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    data = structured(rows, d)
    coder = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k))
    coder.b_dec.data.copy_(data.mean(0))
    adam = torch.optim.Adam(coder.parameters(), lr=4e-4, fused=True)
    order = torch.Generator().manual_seed(1)

    def step() -> None:
        coder.set_decoder_norm_to_unit_norm()
        x = data[torch.randint(rows, (batch,), generator=order)]
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        step()
        taken = time.perf_counter() - wall, time.process_time() - processor
        print(*taken, file=answer, flush=True)
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], file=answer)


if __name__ == "__main__":
    main()
