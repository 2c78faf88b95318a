"""Every Triton program of the k-SAE step compiles for cards that are not there, and fits them.

Triton is no dependency on a CPU, so this file is not collected by default:

    python -m venv --system-site-packages with-triton && with-triton/bin/pip install --no-deps triton
    PYTHONPATH=. with-triton/bin/python -m pytest -c /dev/null --rootdir . tests/optional/check_triton.py
"""

import ast
import json
import os
import subprocess
import sys
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

CARDS = ("80", "90", "100")
FRAME = 16  # bytes of stack that are no spill
REGISTERS, SHARED = (
    64 << 10,
    48 << 10,
)  # of a multiprocessor; a program's share without asking for more


@pytest.fixture(scope="module")
def programs() -> list[dict[str, Any]]:
    """What the compiler says of each program on each card; in a process without the interpreter."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, str(Path(__file__).with_name("triton_programs.py")), *CARDS]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=given)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_program_that_is_launched_compiles_for_every_card(programs) -> None:
    from revelio.sae.kernels import cuda

    launched = {
        ast.unparse(node.value).removeprefix("programs.")
        for node in ast.walk(ast.parse(getsource(cuda)))
        if isinstance(node, ast.Subscript) and ast.unparse(node).startswith("programs.")
    }
    assert len(launched) >= 12
    for card in map(int, CARDS):
        assert {one["program"] for one in programs if one["card"] == card} == launched


def test_no_program_spills_or_asks_for_more_than_a_card_has(programs) -> None:
    for one in programs:
        assert one["spilled"] <= FRAME, one
        assert one["registers"] * 32 * one["warps"] <= REGISTERS, one
        assert one["shared"] <= SHARED, one
