"""The order of samples: the same however many processes share a step.

Each epoch's permutation is cut into steps of `effective_batch` samples; the last step is filled up from the
permutation's beginning. By length: stretches of many steps are sorted, so that samples of about one
length meet, then the steps are shuffled. The order depends on (seed, epoch) and nothing else.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from revelio.seeds import generator

# Steps sorted together; more would make neighbouring epochs alike, fewer leave more padding.
STRETCH = 50


class StepSampler(Sampler[int]):
    """Sample indices of one epoch after another; a ``DataLoader``'s sampler.

    Attributes:
        epoch: whose order comes next. There is no ``set_epoch`` on purpose: data loaders call it through as
            many levels of samplers as they know of, which are fewer with several processes or after a
            resume, and then the order of another epoch comes. The Trainer's loop sets this instead.
    """

    def __init__(
        self, lengths: Sequence[int], effective_batch: int, seed: int, *, by_length: bool = True
    ) -> None:
        self.lengths = lengths
        self.effective_batch = effective_batch
        self.seed = seed
        self.by_length = by_length
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps * self.effective_batch

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return -(-len(self.lengths) // self.effective_batch)

    def __iter__(self) -> Iterator[int]:
        source = generator(self.seed, "order", self.epoch)
        order = torch.randperm(len(self.lengths), generator=source).tolist()
        while len(order) < len(self):
            order += order[: len(self) - len(order)]
        if not self.by_length:
            yield from order
            return
        size, stretch = self.effective_batch, STRETCH * self.effective_batch
        batches = []
        for start in range(0, len(order), stretch):
            some = sorted(order[start : start + stretch], key=lambda i: self.lengths[i])
            batches += [some[first : first + size] for first in range(0, len(some), size)]
        for number in torch.randperm(len(batches), generator=source).tolist():
            yield from batches[number]
