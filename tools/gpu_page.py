"""Write docs/gpu.md from docs/gpu.json, gpu_compiled and gpu_memory: `python -m tools.gpu_page [--check]`."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revelio.run_dir import read_json, write_whole
from tools.scaling import CARDS

ABSENT = "not measured"
PEERS = (
    "sparsify float32",
    "sparsify tf32",
    "sparsify bf16",
    "dense float32",
    "dense tf32",
    "dense bf16",
)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with --check only say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--check", action="store_true")
    flags = parser.parse_args(arguments)
    found = read_json(flags.docs / "gpu.json")
    found["compiled"] = read_json(flags.docs / "gpu_compiled.json")
    found["memory"] = read_json(flags.docs / "gpu_memory.json")
    text, place = page(found), flags.docs / "gpu.md"
    if not flags.check:
        write_whole(place, text)
    elif place.read_text(encoding="utf-8") != text:
        print(f"{place} is not what gpu.json says: run python -m tools.gpu_page")
        return 1
    return 0


def page(found: Mapping[str, Any]) -> str:
    """The page."""
    return "\n".join(
        [
            "# On a GPU",
            "",
            "<!-- written by tools/gpu_page.py from docs/gpu.json -->",
            f"Measured on one **{found['card']}** (torch {found['torch']}, Triton {found['triton']}). `make "
            "gpu-check PYTHON=python3` runs the tests and a short form of these benchmarks on yours, "
            "with the torch "
            "that is there, and writes `gpu_report.json` and a page. `python -m pip install "
            "\".[dev]\"` beforehand "
            "brings what is missing and leaves a torch from 2.6 up as it is.",
            "",
            *_tests(found["tests"]),
            *_compiled(found["compiled"]),
            *_ksae(found["ksae"]),
            *_memory(found["memory"], found["ksae"]["goal"]),
            *_extraction(found["extraction"], found["extraction_parts"]),
            "## Not run",
            *[f"- {what}" for what in found["not_run"]],
            "",
        ]
    )  # fmt: skip


def _tests(parts: list[Mapping[str, Any]]) -> list[str]:
    rows = [
        f"| {part['part']} | {part['passed']} | {part['failed']} | {part['run_on']} |"
        for part in parts
    ]
    notes = [f"{part['part']}: {part['note']}." for part in parts if part.get("note")]
    return [
        "## CUDA against the CPU",
        "| tests (`tests/cuda`) | passed | failed | run on |",
        "|---|---|---|---|",
        *rows,
        "",
        *notes,
        "",
    ]


def _compiled(made: Mapping[str, Any]) -> list[str]:
    cards = ", ".join(f"sm_{card}" for card in made["cards"])
    sizes = "; ".join(
        f"d = {one['d']:,}, k = {one['k']}, {one['k_among']} of AuxK" for one in made["shapes"]
    )
    tiles = "; ".join(
        f"that of {one['rows']} x {one['columns']} spills "
        + ", ".join(f"{lost:,} bytes on sm_{card}" for card, lost in one["spilled"].items())
        for one in made["tiles"]
    )
    return [
        "**Without a card**, as they are now: Triton's compiler and assembler build all "
        f"{made['programs']} programs of the k-SAE step for {cards} (Triton {made['triton']}; {sizes}). "
        f"A thread takes at most {made['registers']} registers, a program at most {made['shared']:,} bytes "
        f"of shared memory, and nothing spills (frames of at most {made['spilled']} bytes), the product's "
        f"tiles apart: {tiles}. `tests/optional/check_triton.py` holds them to that. That they compile does "
        "not say that they are right or fast.",
        "",
    ]


def _memory(counted: Mapping[str, Any], goal: Mapping[str, Any]) -> list[str]:
    """What steps hold as the code is now, which no card has said."""
    most = goal["peak_over_parameters_and_moments"]
    rows = {
        batch: {one["selection"]: one["times"] for one in counted["peaks"] if one["batch"] == batch}
        for batch in sorted({one["batch"] for one in counted["peaks"]})
    }
    met = [f"{batch:,}" for batch, row in rows.items() if row["within"] <= most]
    return [
        f"**Peak memory as the code is now**, counted without a card (`python -m tools.ksae_memory`; "
        f"d = {counted['d']:,}, n = {counted['n']:,}, k = {counted['k']}; without what PyTorch's operations "
        "take while they run), in parameters and moments:",
        "",
        "| batch | selection after the product | within it |",
        "|---|---|---|",
        *[
            f"| {batch:,} | {row['after']:.3f} | {row['within']:.3f} |"
            for batch, row in rows.items()
        ],
        "",
        f"The goal of {most:g} is met at batch {', '.join(met)}, with selection within the product, and "
        "nowhere else: a float16 copy of the encoder alone is a twelfth, and at large batches the rows "
        "themselves, their reconstruction and their errors take the rest."
        if met
        else f"The goal of {most:g} is met nowhere.",
        "",
    ]


def _ksae(found: Mapping[str, Any]) -> list[str]:
    goal = found["goal"]
    lines = [
        "## The k-SAE step",
        f"d = {found['d']:,}, n = {found['n']:,}, k = {found['k']}; milliseconds a step, in brackets "
        "how many times "
        "as long as ours, by pairs taken in turn (in the first table our own time still changed from "
        "pair to pair). `dense` is the released step with fused Adam, sparsify is EleutherAI's "
        "with its Triton decoder and the same Adam.",
        "",
    ]  # fmt: skip
    batches = sorted({one["batch"] for run in found["runs"] for one in run["batches"]})
    for run in found["runs"]:
        by_size = {one["batch"]: one for one in run["batches"]}
        lines += [f"**{run['name'].capitalize()}**, {run['engine']}:", ""]
        lines += ["| batch | ours | " + " | ".join(PEERS) + " | samples/s | peak GiB |"]
        lines += ["|---" * (4 + len(PEERS)) + "|"]
        lines += [_row(size, by_size.get(size)) for size in batches] + [""]
    last = found["runs"][-1]["batches"]
    best = [_times_best(one) for one in last if _times_best(one)]
    lines += [
        f"The goal was {goal['times_the_best_peer']:g} times the best peer, "
        f"{100 * goal['share_of_the_product']:.0f} % "
        "of the time in the one product, and a peak of at most "
        f"{goal['peak_over_parameters_and_moments']:g} times "
        f"parameters and moments ({found['parameters_and_moments_gib']} GiB). {_verdict(found)}: in its "
        f"later steps it is {min(best):.2f} to {max(best):.2f} times as fast as sparsify, and the "
        "nomination's product "
        f"is {_shares(last)} of the step. The peak is {_peaks(found)} times.",
        "",
        _bound(found),
        "",
        "Where the time goes, in milliseconds by the profiler:",
        "",
        *_parts(last),
        "",
        "When this was measured, the update was one program a latent that added the terms of its gradient "
        "one after another. Once some latents fire on a large share of a batch, those programs run long "
        "after the others have ended, and the device waits for them. Since then the terms of such a latent "
        "are added in blocks by programs of their own, in a fixed order; that was compiled for this card and "
        "compared with the dense update in Triton's interpreter (`tests/test_sae_triton.py`), **not run on "
        "a card**.",
        "",
        "Selection reads all approximate scores twice, where the product has just written them. Since then "
        "there is a product that keeps its scores in registers and writes down only what may be among the "
        "best (`revelio/sae/kernels/cuda_within.py`), with the same bits in Triton's interpreter "
        "(`tests/test_sae_triton_within.py`), too. A training takes its third batch both ways and keeps to "
        "the faster one. **Not run on a card**, so which that is nobody knows.",
        "",
    ]  # fmt: skip
    return lines


def _verdict(found: Mapping[str, Any]) -> str:
    """How many of the goals the last run misses."""
    goal, held = found["goal"], found["parameters_and_moments_gib"]
    missed = set()
    for one in found["runs"][-1]["batches"]:
        own = one["revelio"]
        missed |= {"speed"} if _times_best(one) < goal["times_the_best_peer"] else set()
        product = one["product_alone_ms"]["float16"] / own["ms"]
        missed |= {"product"} if product < goal["share_of_the_product"] else set()
        most = goal["peak_over_parameters_and_moments"] * held
        missed |= {"peak"} if own["peak_gib"] > most else set()
    return (
        "**All three are missed**"
        if len(missed) == 3
        else f"**Missed: {', '.join(sorted(missed))}**"
    )


def _bound(found: Mapping[str, Any]) -> str:
    """The largest share that the product can have: Adam reads and writes every row that moves."""
    rate, held = CARDS["memory_tb_s"]["H100"], found["parameters_and_moments_gib"] * 2**30
    moved = 2 * held / (rate * 1e12) * 1e3  # milliseconds
    products = {
        one["batch"]: one["product_alone_ms"]["float16"]
        for run in found["runs"]
        for one in run["batches"]
    }
    shares = ", ".join(
        f"{100 * ms / (ms + moved):.0f} % at {size:,}" for size, ms in sorted(products.items())
    )
    return (
        f"The share of the product has a ceiling: where every latent moves, Adam reads and writes parameters "
        f"and moments once, {moved:.2f} ms at the card's {rate:g} TB/s. With nothing else in the step "
        f"the product would be {shares}. The goal of {100 * found['goal']['share_of_the_product']:.0f} % can "
        "be met only where most latents rest, or at larger batches."
    )


def _row(size: int, one: Mapping[str, Any] | None) -> str:
    if one is None:
        return f"| {size:,} | {ABSENT} |" + f" {ABSENT} |" * (2 + len(PEERS))
    own = one["revelio"]
    others = [one["others"].get(name) for name in PEERS]
    cells = [
        f"{peer['ms']:.2f} ({peer['revelio_is_times_faster']:.2f})" if peer else ABSENT
        for peer in others
    ]
    rest = f"{own['samples_per_second']:,} | {own['peak_gib']:.2f}"
    return f"| {size:,} | {own['ms']:.2f} | " + " | ".join(cells) + f" | {rest} |"


def _times_best(one: Mapping[str, Any]) -> float:
    """How many times as fast as the best of sparsify's settings; 0 where there is none."""
    peers = [p for name, p in one["others"].items() if name.startswith("sparsify")]
    return min((peer["revelio_is_times_faster"] for peer in peers), default=0.0)


def _shares(batches: list[Mapping[str, Any]]) -> str:
    shares = [one["product_alone_ms"]["float16"] / one["revelio"]["ms"] for one in batches]
    return f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"


def _peaks(found: Mapping[str, Any]) -> str:
    held = found["parameters_and_moments_gib"]
    peaks = [one["revelio"]["peak_gib"] / held for run in found["runs"] for one in run["batches"]]
    return f"{min(peaks):.2f} to {max(peaks):.2f}"


def _parts(batches: list[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for one in batches for name in one["revelio"]["parts_ms"]))
    head = "| | " + " | ".join(f"batch {one['batch']:,}" for one in batches) + " |"
    rows = []
    for name in names:
        held = [one["revelio"]["parts_ms"].get(name) for one in batches]
        cells = " | ".join(ABSENT if ms is None else f"{ms:.3f}" for ms in held)
        rows.append(f"| {name} | {cells} |")
    return [head, "|---" * (1 + len(batches)) + "|", *rows]


def _extraction(found: Mapping[str, Any], parts: Mapping[str, Any]) -> list[str]:
    settings, goal = found["settings"], found["goal"]
    times, busy = found["times_faster_than_the_loop"], found["share_of_time_the_device_computes"]
    rows = [
        f"| {name} | {rate:,.1f} | {times[name]:.2f} | {100 * busy[name]:.0f} % |"
        for name, rate in found["images_per_second"].items()
    ]
    ms = parts["ms_per_image"]
    plain, vae = ms["VAE encoder"] + ms["whole U-Net"], "VAE encoder, compiled"
    cut = ms["U-Net cut after up_ft1"]
    scratch, further = "one timestep from scratch", "a further timestep, from cached latents"
    return [
        "## Extraction",
        f"SD-1.5's size with random weights, up_ft1, {settings['side']} px, {settings['dtype']}, batches of "
        f"{settings['batch']}, {settings['images']} pictures through {settings['workers']} readers, "
        "pictures to stored "
        "rows; against a plain diffusers loop with a hook in the same number format, with the same readers.",
        "",
        "| | images/s | times the loop | device busy |",
        "|---|---|---|---|",
        *rows,
        "",
        f"Peak memory {found['peak_gib']} GiB. The goals were {goal[scratch]:g} times from scratch "
        "(**missed: "
        f"{times[scratch]:.2f}**), {goal[further]:g} times for a further timestep ({times[further]:.2f}) and "
        f"{100 * goal['share_of_time_the_device_computes']:.0f} % busy (**missed**).",
        "",
        f"The parts alone, milliseconds an image (batch {parts['batch']}, {parts['side']} px, "
        f"{parts['dtype']}):",
        "",
        "| " + " | ".join(ms) + " |",
        "|---" * len(ms) + "|",
        "| " + " | ".join(f"{value:.2f}" for value in ms.values()) + " |",
        "",
        "The VAE is what a first timestep costs. `--compile` compiles it and the U-Net's blocks: by "
        "these parts "
        f"{plain / (ms[vae] + cut):.1f} times the loop would be expected from scratch, with the U-Net "
        "not even "
        "compiled. That was **not run** end to end. Compiling the encoder took "
        f"{parts['compile_seconds']} s and moved its results by "
        f"{100 * parts['compiled_relative_difference']:.1f} % in "
        f"{parts['dtype']}; {parts['note']}.",
        "",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
