"""Which kernel a training uses: the native one on a CPU that can build it, else plain PyTorch."""

from typing import Literal, NamedTuple

import torch

from revelio.sae.kernel import Kernel, SparseKernel
from revelio.sae.kernel_native import NativeKernel
from revelio.sae.kernel_native_build import NativeUnavailable, library, library_path
from revelio.sae.model import KSparseAutoencoder

KernelName = Literal["auto", "native", "torch"]


class ChosenKernel(NamedTuple):
    """A kernel, and one line that says which it is and why."""

    kernel: Kernel
    reason: str


# What commands say before the seconds that compiling may take.
COMPILING = "compiling the native kernel, once: some seconds"


def choose_kernel(name: KernelName = "auto", device: torch.device | str = "cpu") -> ChosenKernel:
    """The kernel of that name; `auto` takes the native one where it can be had.

    Raises:
        ValueError: the native kernel was asked for and cannot be had, or a name is unknown.
    """
    if name not in ("auto", "native", "torch"):
        raise ValueError(f"unknown kernel {name!r}: choose auto, native or torch")
    if name == "torch":
        return ChosenKernel(SparseKernel(), "kernel: PyTorch, as asked for")
    try:
        if torch.device(device).type != "cpu":
            raise NativeUnavailable(f"it runs on a CPU, not on {device}")
        library()
    except NativeUnavailable as why:
        if name == "native":
            raise ValueError(f"no native kernel: {why}; or set kernel to torch") from why
        return ChosenKernel(SparseKernel(), f"kernel: PyTorch (no native kernel: {why})")
    kernel = NativeKernel()
    how = f"{kernel.instructions} nomination, float32 scores"
    return ChosenKernel(kernel, f"kernel: native, exact ({how})")


def fastest_kernel(model: KSparseAutoencoder) -> Kernel:
    """What a model computes with if nothing else is said: its own kernel, but native for PyTorch's."""
    if isinstance(model.kernel, SparseKernel) and model.W_enc.dtype == torch.float32:
        return choose_kernel("auto", model.W_enc.device).kernel
    return model.kernel


def must_compile(name: KernelName, device: torch.device | str) -> bool:
    """Whether :func:`choose_kernel` would have to compile first, which takes some seconds."""
    if name == "torch" or torch.device(device).type != "cpu":
        return False
    try:
        return not library_path().is_file()
    except NativeUnavailable:
        return False
