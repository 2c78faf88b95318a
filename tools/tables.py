"""Results as Markdown, rendered from their JSON: docs/measured.md in full, README's summary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from revelio.analysis.paired import listed
from revelio.run_dir import read_json
from tools.demo_tables import demo_lines, demo_tables
from tools.evidence_page import CASES
from tools.ksae_tables import ksae_lines, ksae_summary, ksae_trained_line


def measured(docs: Path) -> str:
    """docs/measured.md: the demo's tables and the benchmarks whose JSON is in ``docs``."""
    parts = _rendered(docs, RENDERED)
    return f"# Measured\n\nWritten by `python -m tools.render_docs`.\n\n{parts.rstrip()}\n"


def summary(docs: Path) -> str:
    """README's measured part: a line or two a result."""
    return _rendered(docs, SUMMARIZED)


def _rendered(docs: Path, renders: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    there = (name for name in renders if (docs / name).exists())
    return "".join(renders[name](read_json(docs / name)) + "\n" for name in there)


def extraction_line(result: dict[str, Any]) -> str:
    """The extraction benchmark's ratios in one paragraph."""
    settings = result["settings"]
    ratios = ", ".join(f"{name}: {value:.2f}" for name, value in result["ratios"]["cpu"].items())
    return (
        f"`benchmarks/extraction.py` (SD-1.5's architecture, {settings['side']} px, batch "
        f"{settings['batch']}, {settings['dtype']}, {settings['threads']} threads), a plain diffusers loop's "
        f"processor time over Revelio's; {ratios}.\n"
    )


def top_images_line(result: dict[str, Any]) -> str:
    """The top images' benchmark, by TopK codes and by ReLU of the pre-activations."""
    parts = [
        f"by {name} {result[f'{own}, times']:.1f} times as fast as by one dense matrix "
        f"({result[own]['gib_above_inputs']:.2f} GiB above the inputs against "
        f"{result[other]['gib_above_inputs']:.2f})"
        for name, own, other in (
            ("TopK codes", "sparse", "dense codes"),
            ("dense codes, as released,", "streamed", "dense"),
        )
    ]
    return (
        f"`benchmarks/ksae_top_images.py`: the top {result['m']} of {result['rows']:,} images for "
        f"{result['n']:,} latents, streamed: {'; '.join(parts)}.\n"
    )


def fvu_line(result: dict[str, Any]) -> str:
    """The benchmark of time to a fraction of variance unexplained."""
    ours, dense = result["own"]["seconds"], result["dense"]["seconds"]
    n = result["d"] * result["expansion"]
    return (
        "`benchmarks/ksae_time_to_fvu.py`: to the same fraction of variance unexplained "
        f"({result['fvu']:.3f}) on real activations (d = {result['d']}, n = {n:,}, batch {result['batch']}) "
        f"in {ours:.0f} s, the dense released step in {dense:.0f} s: {result['times']:.1f} times as fast.\n"
    )


def llava_mini_line(result: dict[str, Any]) -> str:
    """The LLaVA extension's proof: open answers of its rows, beside a linear probe, and blind."""
    rows = "; ".join(
        f"{row} {_hundred(one['open'])}, probe {_hundred(one['probe'])}, blind {_hundred(one['blind'])}"
        for row, one in result["rows"].items()
    )
    classes = len(result["data"]["classes"])
    return (
        f"`make demo-llava` (SmolLM2-135M, {classes} classes of Caltech-101; `docs/llava_mini.md`): open "
        f"questions about held-out photographs answered rightly, in percent (95 % interval), by the paper's "
        f"four rows small, by a linear probe on the same tokens, and by the same models shown another "
        f"picture: {rows}; chance {100 / classes:.1f}.\n"
    )


def _hundred(entry: dict[str, Any]) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(
        *(100 * entry[key] for key in ("value", "low", "high"))
    )


def llava_train_line(result: dict[str, Any]) -> str:
    """What the tower cache and ZeRO-3 save the small rows of the LLaVA extension."""
    steps = "; ".join(
        f"{row}, batch {one['batch']}, {one['seconds']['towers run']:.2f} s and "
        f"{one['seconds']['cached']:.2f} s ({one['speedup']:.2f}x"
        + (
            f", {one['plain / cached']:.2f}x as fast as plain transformers)"
            if "plain / cached" in one
            else ")"
        )
        for row, one in result["stage-1 step"].items()
    )
    memory = result["ZeRO-3 memory"]
    size = (
        f" of a language model of {memory['parameters'] / 1e6:.0f} M"
        if "parameters" in memory
        else ""
    )
    loading = (
        f"; until it is loaded {_two_and_one(memory['loading'])}" if "loading" in memory else ""
    )
    return (
        f"`benchmarks/llava_train.py` (SmolLM2-135M, {result['threads']} threads): a "
        f"stage-1 step without the tower cache and with it: {steps}. Stage 2{size} with ZeRO-3 "
        f"peaks at {_two_and_one(memory)}{loading}, libraries included.\n"
    )


def llava_loading_line(result: dict[str, Any]) -> str:
    """What each process holds of a language model that is loaded under ZeRO-3."""
    rows = "; ".join(
        f"of {row['parameters'] / 1e6:.0f} M, {_two_and_one(row)} ({row['two_to_one']:.3f} of it)"
        for row in result["rows"]
    )
    return (
        f"`benchmarks/llava_loading.py`: until stage 2 of a language model in bfloat16 is loaded under "
        f"ZeRO-3, at most: {rows}; libraries and towers included.\n"
    )


def _two_and_one(memory: dict[str, Any]) -> str:
    two, one = (memory["peak_bytes"][count] / 2**30 for count in ("2", "1"))
    return f"{two:.2f} GiB in each of two processes, {one:.2f} GiB in one"


def llava_fusion_line(result: dict[str, Any]) -> str:
    """What fusion by one gather and the KV cache are worth."""
    sizes = result["sizes"]
    fusion, cache = result["fusion"]["loop / gather"], result["generation"]["no cache / cache"]
    return (
        f"`benchmarks/llava_fusion.py` ({result['threads']} threads): interleaving and splicing two "
        f"towers of {sizes['tokens']} tokens into {sizes['batch']} texts, forward and backward, "
        f"{fusion:.1f} times as fast as sample by sample; an answer of {sizes['new_tokens']} tokens "
        f"with the KV cache {cache:.1f} times as fast as without.\n"
    )


def llava_generate_line(result: dict[str, Any]) -> str:
    """Answers beside transformers' own LLaVA class."""
    first, rate = result["first token, seconds"], result["tokens a second"]

    def spread(what: str) -> str:
        wall, processor = (
            "{:.2f}x [{:.2f}, {:.2f}]".format(*result[what][clock])
            for clock in ("wall", "processor")
        )
        tie = all(low <= 1 <= high for _, low, high in result[what].values())
        return f"{wall}, by processor time {processor}{', a tie' if tie else ''}"

    text = "first token of their text rendered before, transformers / ours"
    rendered = f"with their text rendered beforehand {spread(text)}; " if text in result else ""
    return (
        f"`benchmarks/llava_generate.py` (SmolLM2-135M, threads: {result['threads']}, load of the machine: "
        f"{result['load']:g}): the first token "
        f"{first['ours']:.2f} s after the picture and the question, {first['transformers']:.2f} s with "
        f"transformers' own LLaVA class (median of {result['rounds']} rounds and its 95 % interval: "
        f"{spread('first token, transformers / ours')}; {rendered}without the processors "
        f"{spread('first token without processors, transformers / ours')}); "
        f"then {rate['ours']:.1f} tokens a second against {rate['transformers']:.1f} "
        f"({spread('tokens a second, ours / transformers')}).\n"
    )


def maps_line(result: dict[str, Any]) -> str:
    """Heat maps of some latents against the dense way."""
    sizes, ratio = result["sizes"], result["times_faster_than_dense"]["per_processor_second"]
    ours, dense = (max(one["peak_gib"] for one in result["maps"][way]) for way in ("ours", "dense"))
    return (
        f"`benchmarks/cells.py --only maps`: heat maps of {sizes['latents']:,} latents (d = {sizes['d']}, "
        f"n = {sizes['d'] * sizes['expansion']:,}, k = {sizes['k']}, grids of {sizes['side']}) {ratio:.2f} "
        f"times as fast as by dense codes, with the same maps, in {ours:.2f} GiB against {dense:.2f}.\n"
    )


def cells_line(result: dict[str, Any]) -> str:
    """Training on cells that are streamed against training on pooled rows."""
    sizes, turns = result["sizes"], len(result["turns"]["cells"])
    peak = max(one["peak_gib"] for one in result["alone"]["cells"])
    wall, own = (
        "{:.3f} [{:.3f}, {:.3f}]".format(one["mean"], *one["interval"])
        for one in result["cells_over_pooled"].values()
    )
    return (
        f"`benchmarks/cells.py --only training`: cells streamed from a store of {sizes['gb']:g} GB, in a "
        f"process held to {sizes['cap']:g} GiB of data (peak alone {peak:.2f}): {wall} times as many rows a "
        f"second as pooled ones at the same sizes, {own} times as many a second of the processor's (mean of "
        f"{turns} pairs of {sizes['turn']} steps in turn, 95 % interval).\n"
    )


def gallery_line(result: dict[str, Any]) -> str:
    """How soon a large gallery is there."""
    took = result["seconds"]
    frames = [
        f"{pixels} px in each {1000 * took[name]:.0f} ms"
        for pixels in (60, 400)
        if (name := f"a frame, scrolling {pixels} px in each, the page's own thread") in took
    ]
    seen = ("a latent", "an image", "a class, by purity", "the map")
    return (
        f"`benchmarks/gallery_open.py`: a gallery of {result['latents']:,} latents and {result['images']:,} "
        f"images opens from disk in {took['open']:.2f} s; "
        f"{', '.join(f'{name} {took[name]:.2f} s' for name in seen)}; of a frame the page's own thread "
        f"takes, scrolling {', '.join(frames)}.\n"
    )


def evaluation_line(result: dict[str, Any]) -> str:
    """How long an evaluation beside its cheap controls takes."""
    plain, model = result["activations"], result["model"]
    took = [
        f"{one['seconds']['wall']:.0f} s ({one['seconds']['processor']:.0f} s of the processor's)"
        f"{'' if one['seconds']['wall'] < 120 else ', beyond the goal'}"
        for one in (plain, model)
    ]
    return (
        f"`benchmarks/evaluation.py`: `eval-ksae` of the demo's best k-SAE ({result['shown']}, "
        f"{result['images']:,} images) beside {len(plain['controls'])} control dictionaries (goal: "
        f"two minutes): {plain['measures']} measures in {took[0]}; with {model['loss_images']} images "
        f"through the model {model['measures']} in {took[1]}.\n"
    )


def steering_line(result: dict[str, Any]) -> str:
    """What steering costs over plain drawing."""
    asked, methods = result["asked"], result["methods"]
    ratios = [
        "{} {:.3f} [{:.3f}, {:.3f}]".format(name, one["ratio"], *one["ratio_quartiles"])
        for name, one in methods.items()
        if name != "plain"
    ]
    memory = max(one["peak_ratio"] for one in methods.values())
    return (
        f"`benchmarks/steering.py` ({asked['model']}, {asked['steps']} steps, {asked['rounds']} rounds in "
        f"turn): processor time of a picture over the plain pipeline's, median and quartiles: "
        f"{', '.join(ratios)}; peak memory at most {memory:.2f} times.\n"
    )


def evidence_lines(cases: dict[str, Any]) -> str:
    """k-SAEs beside the strongest of their control dictionaries, a column a case."""
    found = {heading: cases[name] for name, (heading, _) in CASES.items() if name in cases}
    heads = [f"{heading}, {one['trainings']} trainings" for heading, one in found.items()]
    lines = [
        f"| k-SAE (strongest control) | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    measures = ("fvu", "loss recovered", "output recovered", "purity", "probe 5")
    for name in measures:
        cells = [_beside_control(one, name) for one in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, level in (("stability", "0.7"), ("stability", "0.9"), ("planted", "0.9")):
        cells = [_found_again(one, name, level) for one in found.values()]
        lines.append(f"| {name}, cosine above {level} | {' | '.join(cells)} |")
        if (name, level) == ("stability", "0.7"):
            once = [_distinct_again(one, level) for one in found.values()]
            lines.append(f"| ... near-duplicates counted once | {' | '.join(once)} |")
    return (
        "k-SAEs on held-out pictures (of diffusion models up_ft1, t = 100), beside six control "
        "dictionaries (`docs/evidence.md`: every measure, every control, every interval):\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _beside_control(case: dict[str, Any], measure: str) -> str:
    entry, controls = case["measures"].get(measure), case["controls"].get(measure, {})
    if entry is None or not controls:
        return "no scale" if measure == "loss recovered" else "not measured"
    best = (min if measure == "fvu" else max)(controls, key=lambda name: controls[name])
    said = entry["verdict"].replace(listed(list(controls)), "any control")
    return f"{entry['value']:.2f} ({best} {controls[best]:.2f}): {said}"


def _distinct_again(case: dict[str, Any], level: str) -> str:
    return _found_again(case["distinct"], "distinct_stability", level) if "distinct" in case else ""


def _found_again(case: dict[str, Any], what: str, level: str) -> str:
    found = case[what]
    values = {name: one[level]["value"] for name, one in found.items() if isinstance(one, dict)}
    ours = values.pop("k-SAE")
    kept = case[f"{what}_verdict"][level]["differences"]
    best = max(kept, key=lambda name: values[name])
    return f"{ours:.2f} ({best} {values[best]:.2f}): {case[f'{what}_verdict'][level]['verdict']}"


RENDERED: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo.json": demo_tables,
    "benchmarks/extraction.json": extraction_line,
    "benchmarks/ksae_step.json": ksae_lines,
    "benchmarks/ksae_step_trained.json": ksae_trained_line,
    "benchmarks/ksae_top_images.json": top_images_line,
    "benchmarks/ksae_time_to_fvu.json": fvu_line,
    "llava_mini.json": llava_mini_line,
    "benchmarks/llava_train.json": llava_train_line,
    "benchmarks/llava_loading.json": llava_loading_line,
    "benchmarks/llava_fusion.json": llava_fusion_line,
    "benchmarks/llava_generate.json": llava_generate_line,
    "benchmarks/cells_maps.json": maps_line,
    "benchmarks/cells_training.json": cells_line,
    "benchmarks/gallery_open.json": gallery_line,
    "benchmarks/evaluation.json": evaluation_line,
    "benchmarks/steering.json": steering_line,
}
# README's share of the same files: what a reader wants before the tables.
SUMMARIZED: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo.json": demo_lines,
    "evidence.json": evidence_lines,
    "benchmarks/ksae_step.json": ksae_summary,
    "benchmarks/extraction.json": extraction_line,
    "llava_mini.json": llava_mini_line,
}
