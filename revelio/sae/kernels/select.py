"""Which kernel a training uses: native code on a CPU that can build it, Triton on CUDA, else PyTorch.

Whether Triton's programs compile is not known before they have been: the first choice for a device takes one
small step with them, some seconds where nothing is compiled yet. Where that fails (a driver too old, no C
compiler, a card that Triton does not compile for) PyTorch's kernel is taken and the cause is said.
"""

import warnings
from functools import cache
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


# The least compute capability that Triton compiles for.
OLDEST_CAPABILITY = (8, 0)
# Characters of a foreign error that are quoted.
LONGEST_CAUSE = 200

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
    if name == "native":
        why = f"it runs on a CPU, not on {device}"
    elif torch.device(device).type != "cuda":
        why = f"it runs on a CUDA device, not on {device}"
    else:
        why = _without_triton(torch.device(device))
    if why and name != "auto":
        raise ValueError(f"no {name} kernel: {why}; or set kernel to torch")
    if why:
        return ChosenKernel(SparseKernel(), f"kernel: PyTorch (no Triton kernel: {why})")
    from revelio.sae.kernels.cuda import CudaKernel

    return ChosenKernel(CudaKernel(), "kernel: Triton, exact (float16 nomination, float32 scores)")


@cache
def _without_triton(device: torch.device) -> str:
    """Why Triton's programs can't run on a CUDA device; empty: they can. Tried once a process."""
    if not find_spec("triton"):
        return "the package triton is not installed"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CAPABILITY:
        capability, oldest = (".".join(map(str, pair)) for pair in (found, OLDEST_CAPABILITY))
        return f"the card's compute capability is {capability}, Triton compiles from {oldest} on"
    try:
        from revelio.sae.kernels.cuda import CudaKernel
        from revelio.sae.kernels.cuda_trial import tried

        tried(CudaKernel(), device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers, drivers and Triton raise whatever they like
        text = " ".join(str(error).split())[:LONGEST_CAUSE]
        return f"its programs don't compile or run: {type(error).__name__}: {text}"
    return ""


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
    if not isinstance(model.kernel, SparseKernel) or model.W_enc.dtype != torch.float32:
        return model.kernel
    chosen = choose_kernel("auto", model.W_enc.device)
    if model.W_enc.is_cuda and isinstance(chosen.kernel, SparseKernel):
        warnings.warn(chosen.reason, stacklevel=2)
    return chosen.kernel


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
