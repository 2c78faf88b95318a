"""What one thread of this machine can do at best: products a second in registers, and bytes read.

Floors for ``benchmarks/ksae_step.py``: what it multiplies and reads takes no less than that.
"""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from revelio.sae.kernels.build import compiler

SOURCE = Path(__file__).with_name("peaks.cpp")
WIDE = ("-mavx512f", "-mavx512vnni")
ROUNDS, READ = 10**7, 2**29  # some 40 ms of products; bytes, more than caches hold
TIMES = 5


def peaks_of_a_thread(wide: bool) -> dict[str, Any]:
    """GB read and billion products of each kind a second of processor time, the best of some runs.

    Args:
        wide: with AVX-512 and VNNI, which the processor must have; else with AVX2.

    Raises:
        NativeUnavailable: no compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "peaks.so"
        flags = ("-O3", "-mavx2", "-mfma", *(WIDE if wide else ()), "-shared", "-fPIC")
        subprocess.run([compiler(), *flags, str(SOURCE), "-o", str(place)], check=True)
        library = ctypes.CDLL(str(place))
    products = {}
    for kind in ("float32", "int16", "int8"):
        multiply = getattr(library, f"multiply_{kind}")
        multiply.restype = ctypes.c_int64
        count = multiply(ctypes.c_int64(ROUNDS))  # also the start: clocks rise
        seconds = least_seconds(lambda of=multiply: of(ctypes.c_int64(ROUNDS)))
        products[kind] = round(count / seconds / 1e9)
    held = torch.ones(READ, dtype=torch.uint8)
    address = ctypes.c_void_p(held.data_ptr())
    seconds = least_seconds(lambda: library.read_all(address, ctypes.c_int64(READ)))
    return {"gigabytes_read": round(READ / seconds / 1e9), "billion_products": products}


def least_seconds(work: Callable[[], Any]) -> float:
    """The least processor time of some runs."""
    taken = []
    for _ in range(TIMES):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)
