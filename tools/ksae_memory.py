"""What a k-SAE's step on CUDA holds at once, counted without a card: nothing is computed or allocated.

    python -m tools.ksae_memory [--d 1280] [--n 81920] [--k 32] [--batch 1024 4096 16384] [--auxk 0]
                                [--selection after within]

The step of :class:`~revelio.sae.kernels.cuda.CudaKernel` is taken on the meta device with all launches of
Triton's programs left out, latents selected after the product or within it, and after every operation the
storages that are alive are added up. Not counted: what PyTorch's operations take while they run (a product's
workspace, a sort's), and gaps between blocks. ``--json docs/gpu_memory.json`` is for ``docs/gpu.md``.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revelio.machine import size as shown
from revelio.sae.config import TrainConfig
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.optim import AdamStep
from revelio.sae.state import TrainState
from revelio.sae.step import Take, train_step

KERNELS = "revelio.sae.kernels"
MODULES = ("cuda", "cuda_search", "cuda_within", "cuda_programs", "cuda_within_programs")
WAYS = ("after", "within")
BLOCK = 512  # bytes: CUDA's allocator gives whole ones
LISTED = 8


@dataclass(frozen=True)
class Held:
    """Bytes of a k-SAE's training on CUDA.

    Attributes:
        state: parameters and Adam's moments.
        kept: what stays from step to step beside them: the kernel's copy, counters of latents.
        peak: the most that a step holds at once beside ``state``, the batch and what is kept included.
        largest: what it is made of then, by size: number formats, shapes and bytes.
    """

    state: int
    kept: int
    peak: int
    largest: tuple[tuple[str, int], ...]


class Live(TorchDispatchMode):
    """Adds up the storages that are alive.

    Attributes:
        peak: bytes of the most that were alive at once, without those that it was told to leave out.
        parts: these by their first tensor's number format and shape, the largest first.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, str, int]] = {}
        self._without = {each.untyped_storage()._cdata for each in without}
        self.peak, self.parts = 0, ()

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        return sum(count for *_, count in self._held.values())

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count them as long as they are alive."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, known = storage._cdata, self._held.get(storage._cdata)
            if key not in self._without and (known is None or known[0].expired()):
                count = -(-storage.nbytes() // BLOCK) * BLOCK
                about = f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
                self._held[key] = (StorageWeakRef(storage), about, count)
        if self.now > self.peak:
            self.peak = self.now
            parts = ((about, count) for _, about, count in self._held.values())
            self.parts = tuple(sorted(parts, key=lambda part: -part[1]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, found))
        self.hold(each for each in leaves if isinstance(each, Tensor))
        return found


class _OnCuda(TorchFunctionMode):
    """Tensors of the meta device say that they are on CUDA: steps take the path without waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "__get__" and func.__self__.__name__ == "is_cuda":
            return args[0].is_meta
        return func(*args, **(kwargs or {}))


class _Clocked:
    """A step's number and rate on the device, as a recorded step has them."""

    def bound(self, take: Take) -> Take:
        """``take``, told the time."""

        def step(x: Tensor, adam: AdamStep, samples: int | Tensor) -> Tensor:
            now = x.new_zeros(5, dtype=torch.float64)
            return take(x, replace(adam, clock=now), samples)

        return step


class _Idle:
    """Programs that do nothing, and hold nothing of what they are given."""

    def __getattr__(self, name: str) -> "_Idle":
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> "_Idle":
        return self

    def __call__(self, *given: Any, **options: Any) -> None:
        pass


def without_launches() -> ModuleType:
    """The CUDA kernel's module, wherever Triton is or isn't installed, whose programs do nothing."""
    stub = not find_spec("triton")
    if stub:
        triton = MagicMock(cdiv=lambda a, b: -(-a // b))
        triton.next_power_of_2 = lambda count: 1 << max(0, count - 1).bit_length()
        sys.modules |= {"triton": triton, "triton.language": triton.language}
    own = [f"{KERNELS}.{name}" for name in MODULES]
    before = {name: sys.modules.pop(name) for name in own if name in sys.modules}
    try:
        # Another than everybody else's, who must find Triton or miss it.
        cuda, search, within = (import_module(name) for name in own[:3])
    finally:
        for name in [*own, *(["triton", "triton.language"] if stub else [])]:
            sys.modules.pop(name, None)
        sys.modules |= before
        for name in own:
            setattr(import_module(KERNELS), name.rpartition(".")[2], before.get(name))
    for module in (cuda, search, within):
        module.programs = _Idle()  # type: ignore[attr-defined]
    cuda.on_device_of = lambda _: nullcontext()  # type: ignore[attr-defined]
    return cuda


def held(
    d: int, n: int, k: int, batch: int, auxk: int = 0, how: str = "after", **settings: Any
) -> Held:
    """What a training of these sizes holds.

    Args:
        d: width of a row.
        n: latents.
        k: codes a row.
        batch: rows a step.
        auxk: AuxK's codes a row; there are some from the second step on.
        how: whether latents are selected after the product that nominates them, or within it.
        settings: of :class:`~revelio.sae.model.KSparseAutoencoder`.
    """
    config = TrainConfig(steps=3, batch_size=batch, auxk=auxk, dead_after=1, warmup_steps=0)
    cuda = without_launches()
    with torch.device("meta"):
        model = KSparseAutoencoder(d, n, k, seed=None, **settings)
        state, kernel = TrainState.start(model), cuda.CudaKernel(how)
        moments = [
            state.moments.W_enc,
            state.moments.W_dec,
            state.moments.b_enc,
            state.moments.b_dec,
        ]
        own = [*model.parameters(), *(part for of in moments for part in (of.mean, of.square))]
        live = Live(without=own)
        live.hold([state.fired_at, state.moments.last])
        with _OnCuda(), live:
            for _ in range(config.steps):
                train_step(model, torch.empty(batch, d), config, state, kernel, _Clocked())
    return Held(sum(each.nbytes for each in own), live.now, live.peak, live.parts)


def main() -> None:
    """Print a line a batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("d", 1280), ("n", 81_920), ("k", 32), ("auxk", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024, 4096, 16_384])
    parser.add_argument("--selection", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    for batch, how in product(given.batch, given.selection):
        one = held(given.d, given.n, given.k, batch, given.auxk, how)
        share = (one.state + one.peak) / one.state
        print(
            f"batch {batch:,}, selection {how} the product: parameters and moments {shown(one.state)}, "
            f"beside them at most {shown(one.peak)} ({one.peak:,} bytes), of which {shown(one.kept)} stay; "
            f"{share:.3f} times"
        )
        for about, count in one.largest[:LISTED]:
            print(f"  {shown(count):>8}  {about}")
        found.append({"batch": batch, "selection": how, "times": round(share, 3)})
    if given.json:
        sizes = {name: getattr(given, name) for name in ("d", "n", "k", "auxk")}
        given.json.write_text(json.dumps(sizes | {"peaks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
