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
REGISTERS = 64 << 10  # of a multiprocessor
SHARED = 48 << 10  # a program's share without asking for more
# What a product's tiles may ask for, all that a multiprocessor gives to one program.
MOST_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.fixture(scope="module")
def programs() -> list[dict[str, Any]]:
    """What the compiler says of each program on each card; in a process without the interpreter."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, str(Path(__file__).with_name("triton_programs.py")), *CARDS]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=given)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_program_that_is_launched_compiles_for_every_card(programs) -> None:
    from revelio.sae.kernels import cuda, cuda_search, cuda_within

    launched = {
        ast.unparse(node.value).removeprefix("programs.")
        for module in (cuda, cuda_search, cuda_within)
        for node in ast.walk(ast.parse(getsource(module)))
        if isinstance(node, ast.Subscript) and ast.unparse(node).startswith("programs.")
    }
    assert len(launched) >= 16
    for card in map(int, CARDS):
        assert {one["program"] for one in programs if one["card"] == card} == launched


def test_no_program_spills_or_asks_for_more_than_a_card_has(programs) -> None:
    for one in programs:
        assert one["registers"] * 32 * one["warps"] <= REGISTERS, one
        product = one["program"] == "nominate"
        assert one["shared"] <= (MOST_SHARED[one["card"]] if product else SHARED), one
        # Tiles are for widths that they divide, the wide one for an H100: elsewhere another way is faster.
        constants = one["constants"]
        suits = not product or constants["COLUMNS"] == 128 or one["card"] == 90
        assert one["spilled"] <= FRAME or not suits or not constants.get("WHOLE", True), one


def test_the_product_s_tiles_are_read_ahead_and_multiplied_by_tensor_cores(programs) -> None:
    found = [one for one in programs if one["constants"].get("WHOLE")]
    assert {one["constants"]["COLUMNS"] for one in found} == {128, 256}
    for one in found:
        assert one["tensor_core_products"] and one["copies_ahead"], one
