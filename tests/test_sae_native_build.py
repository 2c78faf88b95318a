"""Compiling the native kernel: once, into the cache; or one line that says why not, and PyTorch instead."""

import os
import pathlib
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest

from revelio.sae.kernels import build
from revelio.sae.kernels.native import NativeKernel
from revelio.sae.kernels.select import choose_kernel, fastest_kernel, must_compile
from revelio.sae.kernels.sparse import SparseKernel
from revelio.sae.model import KSparseAutoencoder

CPUINFO = pathlib.Path("/proc/cpuinfo")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of its own for a test, and no library loaded before or after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()
    yield tmp_path
    build.library.cache_clear()


def stub(folder, body: str) -> str:
    """A program that stands for a compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_cpu_gets_the_native_kernel_and_says_so():
    chosen = choose_kernel()
    assert isinstance(chosen.kernel, NativeKernel)
    assert "native" in chosen.reason
    assert isinstance(choose_kernel("native").kernel, NativeKernel)
    assert isinstance(fastest_kernel(KSparseAutoencoder(4, 8, 2)), NativeKernel)
    assert not must_compile("auto", "cpu")


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("REVELIO_NATIVE", "0", "switched off"),
        ("CXX", "no-such-compiler", "no C\\+\\+ compiler found: install"),
    ],
)
def test_without_a_compiler_there_is_pytorch_and_one_line(
    variable, value, why, empty_cache, monkeypatch
):
    monkeypatch.setenv(variable, value)
    chosen = choose_kernel("auto")
    assert isinstance(chosen.kernel, SparseKernel)
    with pytest.raises(ValueError, match=why) as error:
        choose_kernel("native")
    assert "\n" not in str(error.value)
    assert not must_compile("auto", "cpu")


def test_an_instruction_set_is_allowed_by_name(monkeypatch):
    monkeypatch.delenv("REVELIO_NATIVE", raising=False)
    best = build.instruction_set()
    order, here = build.INSTRUCTION_SETS, build.instructions_here()
    assert best == here[-1]
    for name in order:
        monkeypatch.setenv("REVELIO_NATIVE", name)
        allowed = [one for one in here if order.index(one) <= order.index(name)]
        assert build.instruction_set() == allowed[-1]
        assert NativeKernel().instructions == build.instruction_set()
        assert build.instruction_set() in choose_kernel().reason
    monkeypatch.setenv("REVELIO_NATIVE", "1")
    assert build.instruction_set() == best
    monkeypatch.setenv("REVELIO_NATIVE", "sse9")
    with pytest.raises(ValueError, match="unknown REVELIO_NATIVE 'sse9': choose 0") as error:
        choose_kernel()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("bits", "name", "taken"),
    [
        (0b011011, "avx-vnni-int8", "avx2-int8"),  # AVX-512 with VNNI, but no AVX-VNNI
        (0b011011, "", "avx512-int8"),
        (0b000111, "avx512-int8", "avx-vnni-int8"),  # AVX-VNNI, but no AVX-512
        (0b000011, "amx", "avx2-int8"),
        (0b111111, "1", "amx"),
        (0b11000000, "", "neon-int8"),
        (0b11000000, "neon", "neon"),
        (0b01000000, "neon-int8", "neon"),  # no products of four
    ],
)
def test_what_the_processor_lacks_is_never_taken(bits, name, taken, monkeypatch):
    monkeypatch.setattr(
        build, "library", lambda: SimpleNamespace(revelio_instructions=lambda: bits)
    )
    monkeypatch.setenv("REVELIO_NATIVE", name)
    assert build.instruction_set() == taken


def test_instructions_of_another_kind_of_processor_are_one_line(monkeypatch):
    arm = SimpleNamespace(revelio_instructions=lambda: 0b11000000)
    monkeypatch.setattr(build, "library", lambda: arm)
    monkeypatch.setenv("REVELIO_NATIVE", "avx2")
    with pytest.raises(ValueError, match="REVELIO_NATIVE=avx2: this processor has neon, neon-int8"):
        build.instruction_set()


@pytest.mark.parametrize(
    ("machine", "told"), [("arm64", False), ("aarch64", False), ("AMD64", True), ("x86_64", True)]
)
def test_avx2_is_asked_for_on_x86_alone(machine, told, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(
        "torch.backends.cpu.get_cpu_capability", lambda: "AVX2" if told else "SVE256"
    )
    assert ("-mavx2" in build.flags()) == told and set(build.FLAGS) <= set(build.flags())


@pytest.mark.skipif(not CPUINFO.is_file(), reason="Linux says what the processor has")
def test_what_the_processor_has_is_what_linux_says_it_has():
    flags = set(CPUINFO.read_text().split("flags")[1].split("\n")[0].split())
    has = {"avx-vnni-int8": {"avx_vnni"}, "avx512-int8": {"avx512bw", "avx512_vnni"}}
    for name, needed in has.items():
        assert (name in build.instructions_here()) == (needed <= flags)


NO_ROOM = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
held = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.cast(held, ctypes.c_void_p), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
print(ctypes.CDLL(sys.argv[1]).revelio_instructions())
"""


def test_where_the_system_refuses_tiles_the_next_slower_product_is_taken():
    """Linux refuses them to a process whose signal stack has no room for them."""
    if "amx" not in build.instructions_here():
        pytest.skip("this processor has no AMX")
    command = [sys.executable, "-c", NO_ROOM, str(build.library_path())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert build.INSTRUCTION_SETS[int(done.stdout).bit_length() - 1] == "avx512-int8"


def test_an_old_processor_and_other_devices_get_pytorch(monkeypatch, empty_cache):
    assert isinstance(choose_kernel("auto", "meta").kernel, SparseKernel)
    with pytest.raises(ValueError, match="not on meta"):
        choose_kernel("native", "meta")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ValueError, match="no AVX2"):
        choose_kernel("native")
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with pytest.raises(ValueError, match="for x86 and 64-bit Arm, not for riscv64"):
        choose_kernel("native")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", stub(empty_cache, "echo 'rows.h: error: no such thing' >&2; exit 1"))
    assert must_compile("auto", "cpu")
    with pytest.raises(ValueError, match=r"failed: rows\.h: error: no such thing"):
        choose_kernel("native")
    assert list((empty_cache / "revelio").iterdir()) == []


def test_it_is_compiled_once_and_a_damaged_library_is_named(empty_cache, monkeypatch):
    calls = empty_cache / "calls"
    body = f'echo x >> {calls}; for last; do :; done; printf "no library" > "$last"'
    monkeypatch.setenv("CXX", stub(empty_cache, body))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"does not load .* remove it"):
            choose_kernel("native")
    assert calls.read_text() == "x\n"
    first = build.library_path()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    assert build.library_path() != first


def test_the_kernel_asked_for_by_name_is_taken():
    assert isinstance(choose_kernel("torch").kernel, SparseKernel)
    assert "PyTorch" in choose_kernel("torch").reason
    with pytest.raises(ValueError, match="unknown kernel 'fast'"):
        choose_kernel("fast")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "without hash", "hash cut"])
def test_a_damaged_library_is_never_loaded_but_compiled_again(empty_cache, monkeypatch, damage):
    # A copy of the compiled kernel stands for the compiler's work.
    monkeypatch.delenv("XDG_CACHE_HOME")
    compiled = build.library_path()
    assert choose_kernel("native") and build.is_whole(compiled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache))
    monkeypatch.setenv("CXX", stub(empty_cache, f'for last; do :; done; cp {compiled} "$last"'))
    build.library.cache_clear()
    path = build.library_path()
    assert path != compiled and must_compile("auto", "cpu")
    choose_kernel("native")
    assert build.is_whole(path) and not must_compile("auto", "cpu")
    whole, digest = path.read_bytes(), build.hash_path(path).read_text()
    changes = {
        "cut": lambda: path.write_bytes(whole[: len(whole) // 2]),
        "flipped": lambda: path.write_bytes(whole[:-9] + b"\x01" + whole[-8:]),
        "empty": lambda: path.write_bytes(b""),
        "without hash": lambda: build.hash_path(path).unlink(),
        "hash cut": lambda: build.hash_path(path).write_text(digest[:20]),
    }
    path.unlink()  # what is loaded must not change under the process
    path.write_bytes(whole)
    changes[damage]()
    build.library.cache_clear()
    assert must_compile("auto", "cpu")
    choose_kernel("native")
    assert path.read_bytes() == whole and build.hash_path(path).read_text() == digest


def test_without_a_home_the_cache_is_this_users_temporary_folder(tmp_path, monkeypatch):
    def nobody(*arguments):
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = build.native_cache()
    assert folder == tmp_path / f"revelio-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(build.NativeUnavailable, match="not this user's alone: set XDG_CACHE_HOME"):
        build.native_cache()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert isinstance(choose_kernel("auto").kernel, SparseKernel)


def test_a_home_that_is_a_file_or_missing_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build.native_cache() == tmp_path / "home" / ".cache" / "revelio"
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build.native_cache() == tmp_path / f"revelio-{os.getuid()}"
