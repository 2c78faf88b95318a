"""Which kernel a training uses: native code on a CPU that can build it, Triton on CUDA, else PyTorch."""

from importlib.util import find_spec
from typing import NamedTuple, get_args

import torch

from revelio.sae.config import KernelName, TrainConfig
from revelio.sae.kernels.base import Kernel
from revelio.sae.kernels.build import NativeUnavailable, is_whole, library, library_path
from revelio.sae.kernels.native import NativeKernel
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.step import Replay


class ChosenKernel(NamedTuple):
    """A kernel, and one line that says which it is and why."""

    kernel: Kernel
    reason: str


# What commands say before the seconds that compiling may take.
COMPILING = "compiling the native kernel, once: some seconds"


def choose_kernel(name: KernelName = "auto", device: torch.device | str = "cpu") -> ChosenKernel:
    """The kernel of that name; `auto` takes the native or the Triton one where it can be had.

    Raises:
        ValueError: a kernel was asked for that cannot be had, or the name is unknown.
    """
    if name not in get_args(KernelName):
        raise ValueError(f"unknown kernel {name!r}: choose from {', '.join(get_args(KernelName))}")
    if name == "torch":
        return ChosenKernel(SparseKernel(), "kernel: PyTorch, as asked for")
    if name == "triton" or torch.device(device).type == "cuda":
        return _triton(name, device)
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


def _triton(name: KernelName, device: torch.device | str) -> ChosenKernel:
    why = "" if find_spec("triton") else "the package triton is not installed"
    if torch.device(device).type != "cuda":
        why = f"it runs on a CUDA device, not on {device}"
    if name == "native":
        why = f"it runs on a CPU, not on {device}"
    if why and name != "auto":
        raise ValueError(f"no {name} kernel: {why}; or set kernel to torch")
    if why:
        return ChosenKernel(SparseKernel(), f"kernel: PyTorch (no Triton kernel: {why})")
    from revelio.sae.kernels.cuda import CudaKernel

    return ChosenKernel(CudaKernel(), "kernel: Triton, exact (float16 nomination, float32 scores)")


def replayed(model: KSparseAutoencoder, kernel: Kernel, config: TrainConfig) -> Replay | None:
    """A CUDA graph of a step whose shapes never change: of TopK, without AuxK and prefixes, in Triton."""
    plain = model.activation == "topk" and not model.prefixes and not config.auxk
    if not plain or not model.W_enc.is_cuda or not find_spec("triton"):
        return None
    from revelio.sae.kernels.cuda import CudaKernel
    from revelio.sae.kernels.cuda_graph import RecordedStep

    return RecordedStep(model, kernel) if isinstance(kernel, CudaKernel) else None


def fastest_kernel(model: KSparseAutoencoder) -> Kernel:
    """What a model computes with if nothing else is said: its own kernel, but native for PyTorch's."""
    if isinstance(model.kernel, SparseKernel) and model.W_enc.dtype == torch.float32:
        return choose_kernel("auto", model.W_enc.device).kernel
    return model.kernel


def moved(model: KSparseAutoencoder, device: torch.device | str) -> KSparseAutoencoder:
    """The model on a device, with what computes fastest there: a native kernel knows CPUs alone."""
    before = model.W_enc.device
    model = model.to(device)
    if model.W_enc.device != before:
        model.kernel = SparseKernel()
        model.kernel = fastest_kernel(model)
    return model


def must_compile(name: KernelName, device: torch.device | str) -> bool:
    """Whether :func:`choose_kernel` would have to compile first, which takes some seconds."""
    if name == "torch" or torch.device(device).type != "cpu":
        return False
    try:
        return not is_whole(library_path())
    except NativeUnavailable:
        return False
