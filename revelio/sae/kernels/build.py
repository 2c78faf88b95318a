"""Compile the native kernel's C++ once and load it.

The sources in ``native`` know no Python and no PyTorch, only pointers: any C++17 compiler will do, it takes
some seconds, and the library serves every Python and PyTorch. It is kept in
``$XDG_CACHE_HOME/revelio`` (or ``~/.cache/revelio``) under a name that the sources, the flags and the
compiler decide, beside its sha256: one that is cut or changed is compiled again, never loaded.
``REVELIO_NATIVE=0`` turns it off; ``CXX`` names the compiler. It holds the code for all of
:data:`INSTRUCTION_SETS` of the processor's kind and takes the fastest that there is; ``REVELIO_NATIVE=avx2``,
``avx2-int8``, ``avx-vnni-int8``, ``avx512`` or ``avx512-int8``, of Arm ``neon``, allows no faster one.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from revelio.files import make_folder, write_whole, write_whole_by
from revelio.process import user_cache

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno"),
    *("-shared", "-fPIC", "-pthread"),
)
X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


# What the search multiplies with, the slowest first: AVX2's int16 and int8, AVX-VNNI's int8, AVX-512 VNNI's
# int16 and int8, bfloat16 in tiles; on Arm NEON's int16 and int8 (products.h).
INSTRUCTION_SETS = (
    *("avx2", "avx2-int8", "avx-vnni-int8", "avx512", "avx512-int8", "amx"),
    *("neon", "neon-int8"),
)


class NativeUnavailable(RuntimeError):
    """Why the native kernel cannot be used here, in one line."""


def native_cache() -> Path:
    """The folder that holds compiled kernels.

    Raises:
        NativeUnavailable: there is none that only this user can write.
    """
    try:
        return user_cache()
    except OSError as error:
        raise NativeUnavailable(str(error)) from error


def compiler() -> str:
    """The C++ compiler's path.

    Raises:
        NativeUnavailable: switched off, or no compiler.
    """
    if os.environ.get("REVELIO_NATIVE") == "0":
        raise NativeUnavailable("switched off by REVELIO_NATIVE=0")
    wanted = os.environ.get("CXX", "").split()
    for name in wanted[:1] or ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise NativeUnavailable("no C++ compiler found: install g++ or clang++, or set CXX")


def flags() -> tuple[str, ...]:
    """What the compiler is told for this processor.

    Raises:
        NativeUnavailable: the sources are not written for it.
    """
    machine = platform.machine().lower()
    if machine in ARM:
        return FLAGS
    if machine not in X86:
        raise NativeUnavailable(f"it is written for x86 and 64-bit Arm, not for {machine}")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise NativeUnavailable("this processor has no AVX2")
    return (*FLAGS, "-mavx2", "-mfma")


def library_path() -> Path:
    """Where the compiled kernel is, or will be.

    Raises:
        NativeUnavailable: see :func:`compiler` and :func:`flags`.
    """
    command = compiler()
    about = os.stat(command)
    digest = hashlib.sha256(repr((flags(), command, about.st_size, about.st_mtime_ns)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return native_cache() / f"ksae-{digest.hexdigest()[:16]}.so"


@cache
def library() -> ctypes.CDLL:
    """The compiled kernel, compiled now if need be.

    Raises:
        NativeUnavailable: see :func:`library_path`; or the compiler failed.
    """
    path = library_path()
    if not is_whole(path):
        _compile(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} does not load ({error}): remove it") from error


def is_whole(path: Path) -> bool:
    """Whether a compiled kernel is there and is what was written."""
    try:
        return hash_path(path).read_text() == _digest(path)
    except (OSError, UnicodeDecodeError):
        return False


def hash_path(path: Path) -> Path:
    """Where a library's sha256 is kept."""
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() + "\n"


def instruction_set() -> str:
    """The fastest of :data:`INSTRUCTION_SETS` that this computer has and ``REVELIO_NATIVE`` allows.

    Raises:
        NativeUnavailable: see :func:`library`.
        ValueError: ``REVELIO_NATIVE`` is not 0, 1 or one of the names, or it leaves none.
    """
    allowed = os.environ.get("REVELIO_NATIVE", "")
    if allowed not in ("", "0", "1", *INSTRUCTION_SETS):
        known = ", ".join(INSTRUCTION_SETS)
        raise ValueError(f"unknown REVELIO_NATIVE {allowed!r}: choose 0 (off), 1, {known}")
    here = instructions_here()
    fastest = (
        INSTRUCTION_SETS.index(allowed) if allowed in INSTRUCTION_SETS else len(INSTRUCTION_SETS)
    )
    left = [name for name in here if INSTRUCTION_SETS.index(name) <= fastest]
    if not left:
        raise ValueError(f"REVELIO_NATIVE={allowed}: this processor has {', '.join(here)}")
    return left[-1]


def instructions_here() -> tuple[str, ...]:
    """Those of :data:`INSTRUCTION_SETS` that this computer has: maybe not every slower one.

    Raises:
        NativeUnavailable: see :func:`library`.
    """
    bits = library().revelio_instructions()
    return tuple(name for i, name in enumerate(INSTRUCTION_SETS) if bits >> i & 1)


def _compile(path: Path) -> None:
    """Compile beside the place and move there, so that a half-written library is never loaded."""
    sources = sorted(str(source) for source in SOURCES.glob("*.cpp"))
    try:
        make_folder(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            command = [compiler(), *flags(), *sources, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                first = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise NativeUnavailable(f"{command[0]} failed: {first}")
            # First the hash, and the library with it: between the two it counts as cut.
            write_whole(hash_path(path), _digest(made))
            write_whole_by(path, lambda place: shutil.copyfile(made, place))
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"compiling into {path.parent} failed: {error}") from error
