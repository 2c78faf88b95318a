"""The native kernel for 64-bit Arm, run by an emulator: it trains to the bits of this computer's.

Neither is a dependency, so this file is not collected by default:

    apt-get install g++-aarch64-linux-gnu qemu-user-static
    PYTHONPATH=. python -m pytest -c /dev/null --rootdir . tests/optional/check_arm.py

What it takes here says nothing of a processor's speed.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from revelio.sae.kernels import build

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
NEON, NEON_INT8 = (build.INSTRUCTION_SETS.index(name) for name in ("neon", "neon-int8"))

if not shutil.which(CROSS) or not shutil.which(EMULATOR):
    pytest.skip(f"needs {CROSS} and {EMULATOR}", allow_module_level=True)


def compiled(folder: Path, compiler: str, flags: tuple[str, ...]) -> str:
    sources = [*sorted(build.SOURCES.glob("*.cpp")), Path(__file__).with_name("native_main.cpp")]
    words = [compiler, *(flag for flag in flags if flag != "-shared"), *map(str, sources)]
    made = folder / Path(compiler).name
    subprocess.run([*words, "-o", str(made)], check=True, capture_output=True)
    return str(made)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> str:
    """The training, compiled for this computer."""
    return compiled(tmp_path_factory.mktemp("here"), build.compiler(), build.flags())


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> str:
    """The training, compiled for Arm as it is compiled there."""
    return compiled(tmp_path_factory.mktemp("arm"), CROSS, (*build.FLAGS, "-static"))


def printed(*words: str | int) -> list[str]:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def on_arm(processor: str, *words: str | int) -> list[str]:
    return printed(EMULATOR, "-cpu", processor, *words)


def test_products_of_four_are_taken_where_the_processor_has_them(arm) -> None:
    assert on_arm("max", arm) == [str(1 << NEON | 1 << NEON_INT8)]
    assert on_arm("cortex-a53", arm) == [str(1 << NEON)]


@pytest.mark.parametrize("instructions", [NEON, NEON_INT8], ids=["neon", "neon-int8"])
def test_a_training_on_arm_has_the_bits_of_one_here(here, arm, instructions) -> None:
    slowest = build.INSTRUCTION_SETS.index(build.instructions_here()[0])
    wanted = printed(here, slowest)
    if instructions == NEON_INT8:  # which gives no codes of a few latents
        wanted = [line for line in wanted if not line.startswith("few")]
    assert len(wanted) >= 31 and len(set(wanted)) > 30
    assert on_arm("max", arm, instructions) == wanted


def test_it_is_compiled_on_arm_as_here(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    monkeypatch.setenv("CXX", CROSS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("REVELIO_NATIVE", raising=False)
    path = build.library_path()
    build._compile(path)
    assert path.read_bytes()[18:20] == b"\xb7\x00" and os.access(path, os.R_OK)  # ELF's AArch64
