"""A training step recorded once as a CUDA graph: some hundred launches become one.

At small batches a step on a fast GPU is shorter than the time in which Python can launch its kernels. A
graph is replayed with the same addresses, so the batch and what changes from step to step (the number t,
the learning rate) are copied to fixed places first. A batch of another size, such as an epoch's last
one, is taken plainly. Where the weights have moved to other addresses (``model.to``) a step is recorded
anew. Where recording fails, all steps are taken plainly, and the cause is said.
"""

import warnings
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from revelio.sae.kernels.cuda import CudaKernel, clock, on_device_of
from revelio.sae.kernels.cuda_within import TRIED
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.optim import AdamStep
from revelio.sae.step import Take

# Plain steps before recording: kernels are compiled and copies of weights made in them.
PLAIN_STEPS = 3
# After so many replays a step is recorded anew, once: another nomination may have become faster.
REPLAYS = TRIED[-1]
# Characters of PyTorch's error that are quoted.
LONGEST_CAUSE = 200


class RecordedStep:
    """See :class:`revelio.sae.step.Replay`.

    Args:
        model: what is trained.
        kernel: with what; its copy of the weights is among what a graph has the addresses of.
    """

    def __init__(self, model: KSparseAutoencoder, kernel: CudaKernel) -> None:
        self._model, self._kernel = model, kernel
        self._seen: Counter[torch.Size] = Counter()
        self._recorded: _Recorded | None = None
        self._plainly = False
        self._replays = 0

    def bound(self, take: Take) -> Take:
        """``take``, recorded when it has run a few times at one batch size, of two at the larger."""

        def step(x: Tensor, adam: AdamStep, samples: int | Tensor) -> Tensor:
            if self._recorded is not None and self._recorded.places != self._places():
                # Whatever lies at the old addresses now is not to be written to.
                self._recorded = None
                self._seen.clear()
            if self._replays == REPLAYS:
                self._recorded = None
                self._seen.clear()
                self._kernel.nomination.forget()
                self._replays += 1
            held = self._recorded
            other = held is None or x.shape != held.x.shape
            if self._plainly:
                return take(x, adam, samples)
            if other and (
                (held is not None and len(x) < len(held.x)) or self._seen[x.shape] < PLAIN_STEPS
            ):
                self._seen[x.shape] += 1
                return take(x, adam, samples)
            with on_device_of(x):
                now = clock(adam, x.device, int(samples))
                if held is None or other:
                    held = self._recorded = self._tried(take, x, adam, now)
                if held is None:
                    return take(x, adam, samples)
                held.x.copy_(x)
                held.clock.copy_(now)
                held.graph.replay()
                self._replays += 1
                return held.numbers.clone()

        return step

    def _places(self) -> tuple[int, ...]:
        weights = (weight.data_ptr() for weight in self._model.parameters())
        return (*weights, id(self._kernel.holds))

    def _tried(self, take: Take, x: Tensor, adam: AdamStep, now: Tensor) -> "_Recorded | None":
        """The recorded step; None, from now on, where a driver or another library lets none be recorded."""
        try:
            return self._record(take, x, adam, now)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._plainly = True
            cause = " ".join(str(error).split())[:LONGEST_CAUSE]
            said = f"steps are not recorded as a CUDA graph, so small batches are slower: {cause}"
            warnings.warn(said, stacklevel=2)
            return None

    def _record(self, take: Take, x: Tensor, adam: AdamStep, now: Tensor) -> "_Recorded":
        batch, told = x.clone(), now.clone()
        recorded = AdamStep(
            adam.t, adam.learning_rate, adam.unit_norm, adam.beta1, adam.beta2, adam.eps, clock=told
        )
        graph = torch.cuda.CUDAGraph()
        # What a user's other threads do on the device, such as a loader's that pins memory, is not recorded
        # and breaks nothing. Where recording fails, PyTorch leaves its own stream the current one.
        here = torch.cuda.stream(torch.cuda.current_stream(x.device))
        with here, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            numbers = take(batch, recorded, told[4].to(torch.int64))
        return _Recorded(graph, batch, told, numbers, self._places(), self._kernel.holds)


class _Recorded(NamedTuple):
    """A graph, the places that it reads and writes, and what it must not outlive.

    Attributes:
        graph: the recorded step.
        x: the batch.
        clock: what changes from step to step.
        numbers: what the step gives.
        places: the addresses of what it changes.
        copy: the kernel's copy of the weights, held so that its identity stays its own.
    """

    graph: torch.cuda.CUDAGraph
    x: Tensor
    clock: Tensor
    numbers: Tensor
    places: tuple[int, ...]
    copy: object
