"""Compile every Triton program that a k-SAE's steps launch, for cards that need not be there.

    python tests/optional/triton_programs.py 80 90 100 [--summary docs/gpu_compiled.json]

Triton brings its compiler and assembler, so that no card is needed. The steps run on CPU tensors; a launch is
compiled with its arguments' types and sizes instead of run. One line of JSON a program and compute capability
(80: A100, 90: H100, 100: B200): constants, registers of a thread, bytes of them put into memory (a frame of
up to 16 is no spill), bytes of shared memory.
"""

# pyright: reportMissingImports=false

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from revelio.sae.kernels import cuda, cuda_search, cuda_within
from revelio.sae.kernels.base import Codes, Gradient, Weights
from revelio.sae.optim import AdamRows, AdamStep

# d, k, candidates of AuxK: the paper's size, odd widths, the widest choice by candidates.
SHAPES = ((1280, 32, 256), (64, 1, 2), (100, 8, 64), (2560, 200, 128))
TOOLS = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"


def step(d: int, k: int, k_among: int) -> None:
    """What a training step launches."""
    n, b = 2048, 128
    weights = Weights(torch.randn(n, d), torch.zeros(n), torch.randn(n, d), torch.zeros(d))
    kernel, x = cuda.CudaKernel(), torch.randn(b, d)
    kernel.encode(x, weights, k, torch.ones(n, dtype=torch.bool), k_among)
    for tile in cuda_within.TILES:
        query = cuda_search.Query.of(kernel._copied(weights.W_enc), x, weights.b_enc)
        cuda_within.WithinProduct(query, tile).fill(cuda_search.empty_codes(x, k))
    codes = Codes(torch.randn(b, k), torch.randint(n, (b, k)))
    kernel.decode(codes, weights.W_dec)
    kernel.code_gradients(codes, x, weights.W_dec)
    moments = AdamRows.start(
        *(getattr(weights, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    )
    kernel.unit_norm(weights, moments)
    images, values = torch.arange(b).repeat_interleave(k), codes.values.flatten()
    terms = Gradient(codes.indices.flatten(), images, images, values, values, x, x, x.sum(0))
    kernel.update(weights, moments, terms, AdamStep(1, 1e-3))


def compiled(
    program: Any, given: dict[str, Any], options: dict[str, Any], card: int
) -> dict[str, Any]:
    """One program for one card, and what its assembler says of it."""
    types, constants, aligned = {}, {}, {}
    for place, one in enumerate(program.params):
        value = given[one.name]
        if one.is_constexpr or (
            isinstance(value, int) and value == 1
        ):  # as Triton specialises ones
            types[one.name], constants[one.name] = "constexpr", value
            continue
        types[one.name] = mangle_type(value)
        size = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(size, int) and size % 16 == 0:
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(program, types, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        words = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(found[1])
        for name in ("REG", "STACK", "LOCAL")
        if (found := re.search(rf"{name}:(\d+)", said))
    )
    ptx = made.asm["ptx"]
    return {
        "program": program.__name__, "card": card, "constants": constants, "registers": registers,
        "warps": options.get("num_warps", 4), "spilled": stack + local, "shared": made.metadata.shared,
        "tensor_core_products": len(re.findall(r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma", ptx)),
        "copies_ahead": ptx.count("cp.async"),
    }  # fmt: skip


def launches() -> Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """The different launches of all shapes' steps: program, arguments, options."""
    seen: dict[Any, tuple[Any, dict[str, Any], dict[str, Any]]] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        names = [one.name for one in self.params]
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in more.items() if k in names}
        options = {k: v for k, v in more.items() if k not in names}
        kinds = (mangle_type(v) if isinstance(v, torch.Tensor) else v for v in given.values())
        seen[self.__name__, tuple(kinds), tuple(options.items())] = (self, given, options)

    JITFunction.run = run  # pyright: ignore[reportAttributeAccessIssue]
    for shape in SHAPES:
        step(*shape)
    yield from seen.values()


def summary(made: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that `docs/gpu.md` gives; the product's tiles apart, which may fill a multiprocessor."""
    tiles = [one for one in made if one["program"] == "nominate" and one["constants"]["WHOLE"]]
    others = [one for one in made if one["program"] != "nominate"]
    return {
        "triton": triton.__version__,
        "cards": sorted({one["card"] for one in made}),
        "programs": len({one["program"] for one in made}),
        "compiled": len(made),
        "shapes": [dict(zip(("d", "k", "k_among"), shape, strict=True)) for shape in SHAPES],
        "tiles": [
            {"rows": rows, "columns": columns, "spilled": _spilled(tiles, rows, columns)}
            for rows, columns, *_ in cuda_within.TILES
        ],
    } | {name: max(one[name] for one in others) for name in ("registers", "spilled", "shared")}


def _spilled(tiles: list[dict[str, Any]], rows: int, columns: int) -> dict[str, int]:
    """By card, the most bytes that a tile of that size puts into memory."""
    own = [
        one
        for one in tiles
        if (one["constants"]["ROWS"], one["constants"]["COLUMNS"]) == (rows, columns)
    ]
    cards = sorted({one["card"] for one in own})
    return {str(card): max(one["spilled"] for one in own if one["card"] == card) for card in cards}


def main() -> None:
    """Compile, and say what came out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cards", type=int, nargs="+")
    parser.add_argument("--summary", type=Path)
    asked = parser.parse_args()
    made = []
    for program, given, options in launches():
        for card in asked.cards:
            made.append(compiled(program, given, options, card))
            print(json.dumps(made[-1]), flush=True)
    if asked.summary:
        asked.summary.write_text(json.dumps(summary(made), indent=1) + "\n")


if __name__ == "__main__":
    main()
