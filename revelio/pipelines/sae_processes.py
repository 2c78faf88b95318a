"""The processes that train a k-SAE together, as a launcher started them; or this one alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from revelio.distributed import device_of, launched, world_size
from revelio.sae.checkpoint import Files
from revelio.sae.config import KernelName, SAEConfig, Sharing
from revelio.sae.dataloader import RowSource
from revelio.sae.distributed import (
    DataParallelKernel,
    Group,
    ShardedKernel,
    SharedRows,
    sharded_model,
)
from revelio.sae.inputs import Input
from revelio.sae.kernels.base import Kernel
from revelio.sae.kernels.select import choose_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.sharded_files import ShardedFiles


@dataclass(frozen=True)
class DistContext:
    """Who trains, and on what.

    Attributes:
        device: this process's.
        group: the processes; None: this one alone.
        sharing: what they share.
        wait: returns once all have called it.
        close: to be called when all went well (:class:`revelio.distributed.Processes`).
    """

    device: torch.device
    group: Group | None = None
    sharing: Sharing = "data"
    wait: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None

    @classmethod
    def gather(cls, device: str, sharing: Sharing) -> Self:
        """The processes that ``torchrun`` or ``accelerate launch`` started, or this one alone.

        Args:
            device: what the user asked for; ``auto`` is each process's own accelerator, or the CPU.
            sharing: what several processes share.

        Raises:
            ValueError: the device cannot be used.
        """
        if world_size() == 1:
            return cls(device_of(device))
        processes = launched(device)
        own = processes.device if device in ("auto", "cuda") else device
        return cls(device_of(own), Group.all(), sharing, processes.wait, processes.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is None:
            self.close()

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.group is None or self.group.rank == 0

    @property
    def world(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else self.group.world

    def model(
        self, config: SAEConfig, d: int, trained_on: dict[str, Any], inputs: Sequence[Input] = ()
    ) -> KSparseAutoencoder:
        """A k-SAE whose weights training will draw, this process's part of it where they share the latents.

        Raises:
            ValueError: the sizes make no sense.
        """
        settings = {**config.sizes(d), "trained_on": trained_on, "inputs": inputs, "seed": None}
        if self.group is not None and self.sharing == "latents":
            return sharded_model(self.group, settings).to(self.device)
        model = KSparseAutoencoder(**settings)
        if self.group is not None:
            model.kernel = DataParallelKernel(model.kernel, self.group)
        return model.to(self.device)

    def kernel(self, model: KSparseAutoencoder, name: KernelName) -> Kernel:
        """What a model of :meth:`model` trains with."""
        inner = choose_kernel(name, self.device).kernel
        if self.group is None:
            return inner
        if self.sharing == "data":
            return DataParallelKernel(inner, self.group)
        return ShardedKernel(inner, self.group, model.held)

    def share_reading(self, source: RowSource) -> RowSource:
        """The source, of which each process reads a part and all get all."""
        assert self.group is not None
        return SharedRows(source, self.group.apart(), self.device)

    def files(self, n: int) -> Files | None:
        """How checkpoints are written; None: this process holds everything."""
        if self.group is None or self.sharing == "data":
            return None
        return ShardedFiles(self.group, n)
