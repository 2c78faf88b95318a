"""A CUDA device that is pretended on the CPU, which tells where the host would wait for it.

Tensors are what they are, on the CPU; those of the device say `cuda:0` when they are asked. What is computed
from one is of the device, too. Told is what PyTorch's `torch.cuda.set_sync_debug_mode` warns of: a number
read on the host, a result whose size depends on values, a copy that isn't `non_blocking`.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / part) for part in ("revelio", "llava_ext"))
# Files that stand between what asks and the mode that sees it.
BETWEEN = (str(Path(torch.__file__).parent), __file__)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# By their numbers or their results' sizes.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount")
READS += ("_unique2", "unique_dim", "unique_consecutive", "_ctc_loss")
READ_AT_ONCE = ("tolist", "numpy", "__array__")


class PretendedCuda:
    """The device: which tensors are on it, and the waits for it so far.

    Attributes:
        waits: `file:function` of this repository's code, and what it called; those of other packages, which
            it called, are left out.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self._memory: dict[int, Any] = {}  # held, so that an address stays one storage's

    def take(self, found: Any, but: object = None) -> Any:
        """All tensors of modules, collections and our own objects, of which one may stay on the host."""
        self._take(found, {id(but)})
        return found

    def _take(self, found: Any, seen: set[int]) -> None:
        if isinstance(found, Tensor):
            storage = found.untyped_storage()
            self._memory[storage._cdata] = storage
            return
        if id(found) in seen:
            return
        seen.add(id(found))
        inside: Iterable[Any] = ()
        if isinstance(found, torch.nn.Module):
            inside = (*found.parameters(), *found.buffers())
        elif isinstance(found, Mapping):
            inside = found.values()
        elif isinstance(found, list | tuple):
            inside = found
        elif type(found).__module__.startswith(("revelio.", "llava_ext.", "device_helpers")):
            inside = getattr(found, "__dict__", {}).values()
        for each in inside:
            self._take(each, seen)

    @property
    def taken(self) -> int:
        """How many storages have been on the device."""
        return len(self._memory)

    def has(self, tensor: Tensor) -> bool:
        """Whether it is on the device."""
        return tensor.untyped_storage()._cdata in self._memory

    def wait(self, what: str) -> None:
        """Note who waits."""
        frame: Any = sys._getframe(1)
        while frame.f_code.co_filename.startswith(BETWEEN):
            frame = frame.f_back
        path = frame.f_code.co_filename
        if path.startswith(OURS):
            place = f"{Path(path).relative_to(ROOT)}:{frame.f_code.co_name}"
            self.waits.append(f"{place} {what}")

    @contextmanager
    def used(self) -> Iterator["PretendedCuda"]:
        """Everything that PyTorch is called for is seen, inside."""
        with _Asked(self), _Computed(self):
            yield self


class _Asked(TorchFunctionMode):
    """What Python asks of tensors: where they are, copies from place to place."""

    def __init__(self, device: PretendedCuda) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, device = kwargs or {}, getattr(func, "__name__", ""), self.device
        on = bool(args) and isinstance(args[0], Tensor) and device.has(args[0])
        if name == "__get__":
            asked = func.__self__.__name__
            if on and asked in ("is_cuda", "is_cpu", "device"):
                return {"is_cuda": True, "is_cpu": False, "device": CUDA}[asked]
            return func(*args, **kwargs)
        if name == "get_device" and on:
            return CUDA.index
        if name == "pin_memory":
            return args[0].clone()  # pinned
        if func is torch.device or name == "_parse_to" or not callable(func):
            return func(*args, **kwargs)
        places = [where for value in tree_leaves((args, kwargs)) if (where := _place(value))]
        others = list(_tensors(args[1:])) if name == "to" else []
        beside = any(device.has(other) for other in others)
        if others and not beside:
            places.append("cpu")
        onto = beside or "cuda" in places or name == "cuda"
        if name in READ_AT_ONCE and on:
            device.wait(name)
        if name in ("to", "cpu", "cuda"):
            return self._moved(func, name, on, onto, places, args, kwargs)
        plain = tree_map(lambda value: CPU if _place(value) == "cuda" else value, (args, kwargs))
        found = func(*plain[0], **plain[1])
        if onto:
            if name in ("tensor", "as_tensor", "from_numpy"):
                device.wait(f"torch.{name} of the host's values")
                found = tree_map(torch.clone, found)
            device.take(found)
        elif on and name == "new_tensor":
            device.wait("new_tensor of the host's values")
            device.take(found)
        return found

    def _moved(self, func, name, on, onto, places, args, kwargs) -> Any:
        """A copy to the device, from it, or of another number format where the tensor is."""
        device, quick = self.device, bool(kwargs.get("non_blocking", False))
        away = on and (name == "cpu" or ("cpu" in places and not onto))
        if name == "cuda":
            func, args, kwargs = Tensor.clone, args[:1], {}
        plain = tree_map(lambda value: CPU if _place(value) == "cuda" else value, (args, kwargs))
        found = func(*plain[0], **plain[1])
        if away:
            device.wait("copy from the device")
            with _Unseen():
                return torch.empty_like(found).copy_(found.detach())
        if onto and not on:
            if not quick:
                device.wait("copy to the device")
            device.take(found := found.clone())  # where nothing had to be done it is the host's own
        return found


class _Unseen:
    """Neither mode sees what is computed inside."""

    def __enter__(self) -> None:
        self._off = torch._C._DisableTorchDispatch()
        self._also = torch._C.DisableTorchFunction()
        self._also.__enter__()

    def __exit__(self, *found: Any) -> None:
        self._also.__exit__(*found)
        del self._off


class _Computed(TorchDispatchMode):
    """What is computed: where results are, and what of it depends on values."""

    def __init__(self, device: PretendedCuda) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, device = kwargs or {}, self.device
        found = func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        here = [tensor for tensor in given if device.has(tensor)]
        if not here:
            return found
        name = func.__name__.split(".")[0]
        if name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            device.wait(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            places = [place for place in args[1] if place is not None]
            if any(place.dtype in (torch.bool, torch.uint8) for place in places):
                device.wait(f"{name} by a mask")
            if not all(device.has(place) for place in places) and device.has(args[0]):
                device.wait(f"{name} by places of the host")
        elif name in ("copy_", "_to_copy"):
            pass  # told where Python asked for it
        elif "embedding_bag" in name:
            pass  # PyTorch makes offsets where the places are, which it asks unseen
        elif any(tensor.dim() and not device.has(tensor) for tensor in given):
            raise RuntimeError(f"{func}: tensors of the device and of the host")
        if name != "_local_scalar_dense":
            device.take(found)
        return found


def _tensors(found: Any) -> Iterable[Tensor]:
    return (value for value in tree_leaves(found) if isinstance(value, Tensor))


def _place(value: Any) -> str:
    """The kind of device that is named; empty: none is."""
    if isinstance(value, torch.device):
        return value.type
    return (
        value.split(":")[0]
        if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")
        else ""
    )


class _Nothing:
    """A stream or an event, on which nothing is to be waited for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: 1.0 if name == "elapsed_time" else self

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: Any) -> None: ...


CARD: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "a pretended card",
    "mem_get_info": lambda *_: (16 << 30, 32 << 30),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: 0),
    **dict.fromkeys(("Stream", "Event", "device", "stream", "current_stream"), _Nothing),
    **dict.fromkeys(("empty_cache", "synchronize", "reset_peak_memory_stats"), lambda *_: None),
    **dict.fromkeys(("manual_seed", "manual_seed_all", "set_rng_state"), lambda *_: None),
    **dict.fromkeys(("set_device", "_lazy_init"), lambda *_: None),
}


@contextmanager
def pretended_card(monkeypatch: Any) -> Iterator[PretendedCuda]:
    """A machine with one card, as far as programs ask PyTorch: what is computed on both sides is refused."""
    for name, told in CARD.items():
        monkeypatch.setattr(torch.cuda, name, told)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda.random, name, CARD[name])
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    with PretendedCuda().used() as card:
        yield card
