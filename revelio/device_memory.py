"""A device's memory: what is free of it, what fits, and one line where a model goes beyond it."""

import gc
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from revelio.machine import size as shown

M = TypeVar("M", bound=nn.Module)
ELSEWHERE = "free what other programs hold of the device, or take another device, such as cpu"


def room(device: torch.device) -> int:
    """Bytes that PyTorch can still take: what the device has free, and what its allocator keeps.

    0 where nothing counts memory, as on a CPU.
    """
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def release(error: BaseException) -> None:
    """Let go of the tensors that an error's frames hold."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        gc.collect()  # cycles of objects hold tensors, too
        torch.cuda.empty_cache()


def largest(sizes: Iterable[int], run: Callable[[int], object]) -> int:
    """The first of descending sizes that runs without going beyond the device's memory; 0: none does."""
    for size in sizes:
        try:
            run(size)
        except torch.OutOfMemoryError as error:
            release(error)
        else:
            return size
    return 0


def too_large(what: str, needed: int | None, free: int, advice: str = "") -> ValueError:
    """What to say of a model that goes beyond a device's memory.

    Args:
        what: the model.
        needed: bytes of its weights, where they are known.
        free: bytes that the device has for them; 0: not known.
        advice: the settings that make it smaller; the device is named by itself.
    """
    takes = "" if needed is None else f": its weights take about {shown(needed)}"
    left = f"{', of which' if takes else ':'} {shown(free)} are free" if free else ""
    helps = f"{advice}, or {ELSEWHERE}" if advice else ELSEWHERE
    return ValueError(f"{what} does not fit the device's memory{takes}{left}; {helps}")


def not_one_fits(free: int) -> ValueError:
    """What to say where a pass of a single image goes beyond a device's memory, of which so much was free."""
    left = f" ({shown(free)} free)" if free else ""
    return ValueError(
        f"not even one image fits the device's memory beside the model{left}: take bfloat16 as the "
        "backbone's dtype, a smaller image_size, or another device"
    )


def placed(model: M, device: torch.device | str, what: str, advice: str = "", **settings: Any) -> M:
    """The model on a device.

    Args:
        model: on the host.
        device: where it goes.
        what: the model, for messages.
        advice: the settings that make it smaller.
        settings: of :meth:`torch.nn.Module.to`.

    Raises:
        ValueError: it goes beyond the device's memory.
    """
    try:
        return model.to(device=device, **settings)
    except torch.OutOfMemoryError as error:
        needed = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        model.to("cpu")  # what had been moved before memory ran out
        release(error)
        raise too_large(what, needed, room(torch.device(device)), advice) from error
