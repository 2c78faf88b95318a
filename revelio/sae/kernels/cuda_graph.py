"""A training step recorded once as a CUDA graph: some hundred launches become one.

At small batches a step on a fast GPU is shorter than the time in which Python can launch its kernels. A
graph is replayed with the same addresses, so the batch and what changes from step to step (the number t,
the learning rate) are copied to fixed places first. A batch of another size, such as an epoch's last
one, is taken plainly.
"""

import torch
from torch import Tensor

from revelio.sae.kernels.cuda import clock
from revelio.sae.optim import AdamStep
from revelio.sae.step import Take

# Plain steps before recording: kernels are compiled and copies of weights made in them.
PLAIN_STEPS = 3


class RecordedStep:
    """See :class:`revelio.sae.step.Replay`."""

    def __init__(self) -> None:
        self._plain = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._x: Tensor | None = None

    def bound(self, take: Take) -> Take:
        """``take``, recorded when it has run a few times at one batch size."""

        def step(x: Tensor, adam: AdamStep, samples: int | Tensor) -> Tensor:
            if self._x is not None and x.shape != self._x.shape:
                return take(x, adam, samples)
            if self._plain < PLAIN_STEPS:
                self._plain += 1
                return take(x, adam, samples)
            now = clock(adam, x.device, int(samples))
            if self._graph is None or self._x is None:
                self._record(take, x, adam, now)
            assert self._graph is not None and self._x is not None
            self._x.copy_(x)
            self._clock.copy_(now)
            self._graph.replay()
            return self._numbers.clone()

        return step

    def _record(self, take: Take, x: Tensor, adam: AdamStep, now: Tensor) -> None:
        self._x, self._clock = x.clone(), now.clone()
        recorded = AdamStep(
            adam.t, adam.learning_rate, adam.unit_norm, adam.beta1, adam.beta2, adam.eps,
            clock=self._clock,
        )  # fmt: skip
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._numbers = take(self._x, recorded, self._clock[4].to(torch.int64))
