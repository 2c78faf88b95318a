"""Which of several processes this one is: process r of W takes shards r, r + W, ..."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta


def _alone() -> None:
    """Wait for nobody."""


@dataclass(frozen=True)
class Processes:
    """One of several processes that share an extraction.

    Attributes:
        rank: this one, counted from 0; 0 prepares the stores and closes them.
        world: how many there are.
        wait: returns once all have called it.
        agree: gives all the main process's number.
        device: the device that is this process's share.
        close: leaves the group, at the end.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = _alone
    agree: Callable[[int], int] = int
    device: str = "auto"
    close: Callable[[], None] = _alone

    @property
    def main(self) -> bool:
        """Whether this one prepares, reports, and closes the stores."""
        return self.rank == 0


def launched(device: str = "auto") -> Processes:
    """The processes that ``torchrun`` started, or ``accelerate launch`` on GPUs; else this one alone.

    On CPUs ``accelerate launch`` starts one process, whatever ``--num_processes`` says: it leaves starting
    the others to MPI.

    Args:
        device: what the user asked for; ``auto`` is each process's own accelerator, or the CPU.
    """
    import torch
    from accelerate import PartialState

    # Without `cpu`, accelerate takes the processes of a machine without a GPU for strangers.
    cpu = device == "cpu" or not torch.accelerator.is_available()
    # Shards take unequal time, and the main process waits for the last one however long it takes.
    state = PartialState(cpu=cpu, timeout=timedelta(days=30))
    if state.num_processes == 1:
        return Processes()
    return Processes(
        state.process_index,
        state.num_processes,
        state.wait_for_everyone,
        _main_number,
        str(state.device),
        state.destroy_process_group,
    )


def _main_number(number: int) -> int:
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([number])[0]
