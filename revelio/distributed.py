"""Which of several processes this one is, and which device is its own: nothing else asks a launcher or CUDA.

``torchrun`` tells its processes who they are by environment variables; ``accelerate launch`` does the same
on GPUs. Process r of W takes shards r, r + W, ...
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_APART: ContextVar[bool] = ContextVar("apart", default=False)


@contextmanager
def apart() -> Iterator[None]:
    """Work that this process does by itself, whoever else was launched: here it is one of one."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def rank() -> int:
    """This process among all that a launcher started, from 0; 0 without one.

    Raises:
        ValueError: the launcher's variables are no such numbers, as when one of them was left over: a process
            that takes itself for another's helper would write nothing.
    """
    if _APART.get():
        return 0
    number, world = _launcher("RANK", "0"), world_size()
    if number >= world:
        raise ValueError(
            f"RANK is {number} and WORLD_SIZE {world}: a launcher sets both; without one, unset them"
        )
    return number


def world_size() -> int:
    """How many processes a launcher started; 1 without one."""
    return 1 if _APART.get() else _launcher("WORLD_SIZE", "1")


def local_rank() -> int:
    """This process among those on its machine, from 0."""
    return _launcher("LOCAL_RANK", "0")


def local_world_size() -> int:
    """How many of the processes are on this machine."""
    return _launcher("LOCAL_WORLD_SIZE", "1")


def _launcher(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdecimal() and len(text) < 9):
        raise ValueError(f"the environment variable {name} is {text[:40]!r}, no number: unset it")
    return int(text)


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def device_of(name: str) -> "torch.device":
    """The device of a name; ``auto`` is CUDA where there is one.

    Raises:
        ValueError: no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} can't be used ({str(error).splitlines()[0]}): "
            "choose auto, cpu, cuda, cuda:1 or mps"
        ) from error
    return device


def own_device() -> str:
    """The name of this process's own accelerator, or of the CPU."""
    return f"cuda:{local_rank()}" if device_of("auto").type == "cuda" else "cpu"


def _alone() -> None:
    """Wait for nobody."""


@dataclass(frozen=True)
class Processes:
    """One of several processes that share the work.

    Attributes:
        rank: this one, counted from 0; 0 prepares the results and closes them.
        world: how many there are.
        wait: returns once all have called it.
        agree: gives all the main process's number.
        gather: gives all the items of everyone's lists, in the order of the processes.
        device: the device that is this process's share.
        close: to be called when all went well; the group is left when the process ends, so that its next work
            finds it. After an error nobody leaves in good order: the launcher ends the others.
    """

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = _alone
    agree: Callable[[int], int] = int
    gather: Callable[[list[Any]], list[Any]] = list
    device: str = "auto"
    close: Callable[[], None] = _alone

    @property
    def main(self) -> bool:
        """Whether this one prepares, reports, and closes the results."""
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
    from accelerate.utils import gather_object

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
        gather_object,
        str(state.device),
        _leave_at_exit,
    )


def left_alone(error: BaseException) -> bool:
    """Whether an exchange with the other processes broke off because one of them has ended."""
    if "torch" not in sys.modules or world_size() == 1:
        return False
    import torch.distributed as dist

    # Gloo's errors have no type of their own.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _leave_at_exit() -> None:
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _main_number(number: int) -> int:
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([number])[0]
