"""README's measured part and docs/measured.md are what the JSON says."""

from pathlib import Path

from revelio.run_dir import read_json
from tools import evidence_page, intervals
from tools.demo_tables import demo_tables
from tools.ksae_tables import KSAE_GOALS, ksae_lines, ksae_summary, ksae_trained_line
from tools.llava_proof import page as llava_page
from tools.mini.page import render
from tools.mini.report import read_report
from tools.paper_results import whole_page
from tools.tables import (
    cells_line,
    fvu_line,
    llava_fusion_line,
    llava_generate_line,
    llava_loading_line,
    llava_mini_line,
    llava_train_line,
    measured,
    summary,
    top_images_line,
)

ROOT = Path(__file__).parent.parent


def report() -> dict:
    cell = {
        "layer": "up_ft1",
        "timestep": 25,
        "majority_share": 0.6789,
        "majority_share_chance": 0.25,
        "interval": {"majority_share": [0.61, 0.72]},
        "interval_method": "95 % over images",
        "latents": 121,
    }
    row = {"layer": "up_ft1", "timestep": 25, "top1": 81.25, "interval": [80.0, 82.5]}
    row |= {"random_weights_top1": 70.0, "random_weights_interval": [69.0, 71.0]}
    row |= {"pixels_top1": 60.0, "pixels_interval": [59.0, 61.0]}
    about = {"model": "m", "dataset": "d", "images": 2000, "test_images": 500, "mode": "fixed"}
    return about | {"purity": [cell], "diffc": [row], "seconds": {"a": 60.0, "b": 30.0}}


def test_tables_hold_the_numbers_of_the_report() -> None:
    text = demo_tables(report())
    assert "| up_ft1 | 0.679 (0.610 to 0.720; 121) |" in text
    assert (
        "| up_ft1, 25 | 81.2 (80.0 to 82.5) | 70.0 (69.0 to 71.0) | 60.0 (59.0 to 61.0) |" in text
    )
    assert "1.5 minutes" in text and "chance 0.250" in text


def test_readme_and_the_measured_page_are_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.split("<!-- measured:", 1)[1].split("\n", 1)[1].split("<!-- /measured -->")[0]
    assert part == summary(ROOT / "docs")
    page = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert page == measured(ROOT / "docs")


def test_the_page_of_the_mini_models_is_up_to_date_and_says_what_sigma_label_depends_on() -> None:
    page = (ROOT / "docs" / "mini_models.md").read_text(encoding="utf-8")
    assert page == render(read_report(ROOT / "docs" / "mini_models.json"))
    assert "it depends on the order of the classes" in page.split("##")[0].replace("\n", " ")


def test_the_page_of_the_papers_tables_is_up_to_date() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == whole_page(read_json(ROOT / "docs" / "results.json"))
    assert "It depends on the order of the class ids" in page.split("##")[0]


def test_the_k_sae_benchmarks_are_read_as_they_are_written() -> None:
    own = {"seconds": 2.0, "peak_gib": 2.84}
    dense = {"processor_seconds": 30.0, "native_is_times_faster": 15.04, "peak_gib": 4.95}
    batch = {"batch": 256, "threads": 2, "dense": dense, "native": own}
    batch |= {"native, all rows moving": {"processor_seconds": 2.5}}
    batch |= {"torch": {"processor_seconds": 4.0}}
    batch |= {"float32 product alone": {"seconds": 3.0}}
    peer = batch | {"sparsify": {"native_is_times_faster": 4.26}}
    peer |= {"float32 product alone": {"seconds": 3.0, "native_is_times_faster": 1.74}}
    machines = {"avx2": {"batches": [batch]}, "amx": {"batches": [peer]}}
    lines = ksae_lines({"d": 1280, "n": 81920, "k": 32, "machines": machines})
    assert "| avx2 | 256 | 15.0x | 12.0x |  | 1.5x | 2.84 and 4.95 | 7.5x |" in lines
    assert "| amx | 256 | 15.0x | 12.0x | 4.3x | 1.7x | 2.84 and 4.95 | 7.5x |" in lines
    ranges = ksae_summary({"d": 1280, "n": 81920, "k": 32, "machines": machines})
    assert "avx2 15 to 15 times; amx 15 to 15 times (4.3 to 4.3)" in ranges
    slow = {
        name: {"by_processor_time": 1.3, "native_is_times_faster": 99.0, "seconds": 1.0}
        for name in KSAE_GOALS
    }
    shared = {"ratio": "by_processor_time", "batches": [peer | {"threads": 1} | slow]}
    shared["batches"][0]["dense"] |= {"by_processor_time": 9.99, "processor_seconds": 30.0}
    found = ksae_lines(
        {"d": 1, "n": 2, "k": 3, "machines": {"avx2": machines["avx2"], "zen": shared}}
    )
    assert "| avx2 | 256 | 15.0x | 12.0x |" in found  # reached: nothing is said
    how = "by processor time, 1 thread, beside other work"
    cells = "10.0x **missed** | 12.0x | 1.3x **missed** | 1.3x **missed** |"
    assert f"| zen ({how}) | 256 | {cells}" in found
    parts = {"encode": 3.0, "update": 1.0}
    steps = [batch | {"native": own | {"processor_parts": parts}}]
    told = {"batches": steps, "product_share_of_encoding": 0.87}
    found = ksae_lines({"d": 1, "n": 2, "k": 3, "machines": {"zen": told}})
    assert "time on zen: batch 256: encoding 75 %, the update 25 %. Of encoding, the nom" in found
    assert "product is 87 % (perf)." in found and "processor time on" not in lines
    peaks = {"gigabytes_read": 40, "billion_products": {"float32": 100, "int8": 400}}
    ours = {"native": own | {"processor_seconds": 0.5}}
    floor = {"float32 product alone": {"seconds": 3.0, "processor_seconds": 2.5}}
    told = {"batches": [batch | ours | floor], "peaks_of_a_thread": peaks}
    found = ksae_lines({"d": 1000, "n": 10**5, "k": 3, "machines": {"zen": told}})
    assert "at most 100 billion float32, 400 billion int8 numbers a second and reads 40 GB" in found
    assert "256: float32's product 0.256 s (PyTorch's takes 2.500 s), int8's 0.064 s; the" in found
    assert "step takes 0.500 s, 1.95 of a float32 product at its floor." in found
    told["batches"][0] |= {"batch": 1, "native in int16": {"by_processor_time": 1.348}}
    found = ksae_lines({"d": 1000, "n": 10**5, "k": 3, "machines": {"zen": told}})
    assert "1: float32's product 0.010 s (PyTorch's takes 2.500 s), int8's 0.003 s" in found
    assert "int8 are 1.35 times at batch 1 as fast (proc" in found  # memory decides
    assert "reads 40 GB" not in lines and "are all held" not in found
    told |= {"held_to": "avx2", "held_by": {"REVELIO_NATIVE": "avx2-int8", "A": "avx2"}}
    found = ksae_lines({"d": 1000, "n": 10**5, "k": 3, "machines": {"zen": told}})
    assert "PyTorch and sparsify are all held to what a processor of kind avx2 has" in found
    assert "(`REVELIO_NATIVE=avx2-int8`, `A=avx2`)" in found and "are all held" not in lines
    memory = {"sparse": 0.1, "dense codes": 5.2, "streamed": 0.4, "dense": 7.2}
    ways = {way: {"gib_above_inputs": gib} for way, gib in memory.items()}
    times = {"sparse, times": 3.21, "streamed, times": 2.15, "m": 10, "rows": 7349, "n": 81920}
    line = top_images_line(ways | times)
    assert "TopK codes 3.2 times" in line and "(0.10 GiB above the inputs against 5.20)" in line
    assert "2.1 times" in line and "(0.40 GiB above the inputs against 7.20)" in line
    race = {"fvu": 0.4, "d": 384, "expansion": 64, "batch": 256, "times": 9.04}
    line = fvu_line(race | {"own": {"seconds": 11.0}, "dense": {"seconds": 99.5}})
    assert "n = 24,576" in line and "9.0 times as fast" in line and "(0.400)" in line


def test_the_llava_benchmarks_are_read_as_they_are_written() -> None:
    step = {"batch": 8, "seconds": {"towers run": 4.0, "cached": 1.6}, "speedup": 2.51}
    step |= {"plain / cached": 1.04}
    peaks = {"peak_bytes": {"1": 3 * 2**30, "2": 2 * 2**30}, "two_to_one": 0.667}
    more = {"peak_bytes": {"1": 6 * 2**30, "2": 3 * 2**30}, "two_to_one": 0.5}
    memory = {"parameters": 305_000_000, "loading": peaks, **more}
    train = {"threads": 2, "stage-1 step": {"clip": step}, "ZeRO-3 memory": memory}
    line = llava_train_line(train)
    assert "clip, batch 8, 4.00 s and 1.60 s (2.51x, 1.04x as fast as plain transformers)" in line
    assert "of a language model of 305 M with ZeRO-3 peaks at 3.00 GiB in each of two" in line
    assert "6.00 GiB in one; until it is loaded 2.00 GiB in each of two processes, 3.00 GiB" in line
    older = llava_train_line(train | {"ZeRO-3 memory": peaks})
    assert (
        "Stage 2 with ZeRO-3 peaks at 2.00 GiB in each of two processes, 3.00 GiB in one," in older
    )
    rows = [{"parameters": 305_000_000, **peaks}, {"parameters": 2_000_000_000, **more}]
    assert (
        "of 305 M, 2.00 GiB in each of two processes, 3.00 GiB in one (0.667 of it); of 2000 M, 3.00 GiB in "
        "each of two processes, 6.00 GiB in one (0.500 of it)"
    ) in llava_loading_line({"rows": rows})
    sizes = {"tokens": 256, "batch": 16, "new_tokens": 24}
    ratios = {"fusion": {"loop / gather": 2.94}, "generation": {"no cache / cache": 3.42}}
    line = llava_fusion_line({"threads": 2, "sizes": sizes} | ratios)
    assert "into 16 texts" in line and "2.9 times" in line and "24 tokens" in line
    assert "3.4 times" in line
    answers = {
        "threads": 2,
        "load": 1.5,
        "rounds": 9,
        "first token, seconds": {"ours": 0.5, "transformers": 0.6},
        "tokens a second": {"ours": 12.3, "transformers": 12.0},
        "first token, transformers / ours": {"wall": [1.2, 1.1, 1.3], "processor": [1.1, 0.9, 1.2]},
        "first token without processors, transformers / ours": {
            "wall": [1.1, 1.05, 1.2], "processor": [1.1, 1.01, 1.2],
        },
        "tokens a second, ours / transformers": {
            "wall": [1.025, 0.98, 1.04], "processor": [0.99, 0.97, 1.02],
        },
    }  # fmt: skip
    line = llava_generate_line(answers)
    assert "threads: 2, load of the machine: 1.5" in line
    assert "the first token 0.50 s after" in line and "0.60 s with transformers' own" in line
    assert "9 rounds and its 95 % interval: 1.20x [1.10, 1.30], by processor time 1.10x" in line
    assert "processor time 1.10x [0.90, 1.20]; without" in line  # one clock alone makes no tie
    assert "12.3 tokens a second against 12.0 (1.02x [0.98, 1.04]" in line
    assert "by processor time 0.99x [0.97, 1.02], a tie)" in line
    both = {"wall": [0.98, 0.97, 0.99], "processor": [0.99, 0.98, 1.0]}
    more = {"first token of their text rendered before, transformers / ours": both}
    said = "with their text rendered beforehand 0.98x [0.97, 0.99], by processor time 0.99x"
    assert said in llava_generate_line(answers | more) and "beforehand" not in line


def test_turns_on_cells_are_read_as_they_are_written() -> None:
    interval = {"mean": 0.98, "interval": [0.955, 1.005]}
    result = {
        "sizes": {"gb": 22.0, "cap": 4.0, "turn": 15},
        "turns": {"cells": [{}] * 80, "pooled": [{}] * 80},
        "alone": {"cells": [{"peak_gib": 1.2}, {"peak_gib": 1.4}]},
        "cells_over_pooled": {"per_second": interval, "per_processor_second": interval},
    }
    line = cells_line(result)
    assert "0.980 [0.955, 1.005] times as many rows a second" in line
    assert "(peak alone 1.40)" in line and "80 pairs of 15 steps" in line


def test_the_step_after_training_is_read_as_it_is_written() -> None:
    one = {"batch": 256, "native": {"multiplied_with": "avx512"}, "dense": {"by_processor_time": 9}}
    line = ksae_trained_line({"trained_steps": 1500, "machines": {"amx": {"batches": [one]}}})
    assert (
        "After 1,500 steps" in line
        and "amx (it multiplies with avx512 by then), batch 256: 9.0 times" in line
    )


def test_the_proof_is_read_as_it_is_written() -> None:
    row = {
        "open": {"value": 0.481, "low": 0.429, "high": 0.532},
        "probe": {"value": 0.791, "low": 0.755, "high": 0.823},
        "blind": {"value": 0.025, "low": 0.014, "high": 0.042},
    }
    line = llava_mini_line({"data": {"classes": ["a"] * 20}, "rows": {"clip": row}})
    assert "clip 48.1 (42.9 to 53.2), probe 79.1 (75.5 to 82.3), blind 2.5 (1.4 to 4.2)" in line
    assert "chance 5.0" in line and "20 classes" in line


def test_pages_of_proofs_are_what_their_json_says() -> None:
    docs = ROOT / "docs"
    evidence, rates = read_json(docs / "evidence.json"), read_json(docs / "llava_rates.json")
    pages = {
        "evidence.md": "\n".join(evidence_page.page(evidence)) + "\n",
        "intervals.md": intervals.page(read_json(docs / "intervals.json")),
        "llava_mini.md": llava_page.render(read_json(docs / "llava_mini.json") | {"rates": rates}),
    }
    pages |= {
        f"evidence_{case}.svg": evidence_page.chart(evidence[case])
        for case in ("cells", "photo", "pooled")
    }
    for name, text in pages.items():
        assert (docs / name).read_text(encoding="utf-8") == text, name
