"""Results as Markdown tables, rendered from their JSON."""

from pathlib import Path
from typing import Any

from revelio.runs import read_json


def measured(docs: Path) -> str:
    """The README's measured part: the demo's tables and the benchmarks whose JSON is in ``docs``."""
    parts = []
    if (docs / "demo.json").exists():
        parts.append(demo_tables(read_json(docs / "demo.json")))
    if (docs / "benchmarks" / "extraction.json").exists():
        parts.append(extraction_line(read_json(docs / "benchmarks" / "extraction.json")))
    if (docs / "benchmarks" / "ksae_step.json").exists():
        parts.append(ksae_line(read_json(docs / "benchmarks" / "ksae_step.json")))
    return "".join(part + "\n" for part in parts)


def demo_tables(report: dict[str, Any]) -> str:
    """Majority share by layer and timestep, and Diff-C beside its baselines."""
    timesteps = list(dict.fromkeys(row["timestep"] for row in report["purity"]))
    layers = list(dict.fromkeys(row["layer"] for row in report["purity"]))
    cell = {(row["layer"], row["timestep"]): row for row in report["purity"]}
    chance = report["purity"][0]["majority_share_chance"]
    lines = [
        f"`make demo`: {report['model']} on {report['images']:,} pictures ({report['dataset']}), mode "
        f"`{report['mode']}`, {sum(report['seconds'].values()) / 60:.1f} minutes on two CPU cores. "
        "Majority share of the latents' ten top images (95 % bootstrap interval over latents; chance "
        f"{chance:.3f}):",
        "",
        "| layer | " + " | ".join(f"t = {t}" for t in timesteps) + " |",
        "|---|" + "---|" * len(timesteps),
    ]
    for layer in layers:
        lines.append(f"| {layer} | " + " | ".join(_share(cell[layer, t]) for t in timesteps) + " |")
    lines += [
        "",
        f"Diff-C, top-1 in percent on {report['test_images']:,} held-out pictures (95 % interval):",
        "",
        "| layer, t | trained model | random weights | raw pixels |",
        "|---|---|---|---|",
    ]
    for row in report["diffc"]:
        found = (_top1(row, prefix) for prefix in ("", "random_weights_", "pixels_"))
        lines.append(f"| {row['layer']}, {row['timestep']} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def _share(row: dict[str, Any]) -> str:
    low, high = row["interval"]["majority_share"]
    return f"{row['majority_share']:.3f} ({low:.3f} to {high:.3f})"


def _top1(row: dict[str, Any], prefix: str) -> str:
    low, high = row[f"{prefix}interval"]
    return f"{row[f'{prefix}top1']:.1f} ({low:.1f} to {high:.1f})"


def extraction_line(result: dict[str, Any]) -> str:
    """The extraction benchmark's ratios in one paragraph."""
    settings = result["settings"]
    ratios = ", ".join(f"{name}: {value:.2f}" for name, value in result["ratios"]["cpu"].items())
    return (
        f"`benchmarks/extraction.py` (SD-1.5's architecture, {settings['side']} px, batch "
        f"{settings['batch']}, {settings['dtype']}, {settings['threads']} threads), a plain diffusers loop's "
        f"processor time over Revelio's; {ratios}.\n"
    )


def ksae_line(result: dict[str, Any]) -> str:
    """The k-SAE benchmark's ratios in one paragraph."""
    rows = "; ".join(
        f"batch {one['batch']}: {one['sparse']['times_dense']:.1f}x, every row moving "
        f"{one['sparse, all rows moving']['times_dense']:.1f}x, peak "
        f"{one['sparse']['peak_gib']:.2f} GiB against {one['dense']['peak_gib']:.2f}"
        for one in result["batches"]
    )
    return (
        f"`benchmarks/ksae_step.py` (d = {result['d']}, n = {result['n']:,}, k = {result['k']}, "
        f"{result['threads']} thread), samples a second over a dense implementation of the released step; "
        f"{rows}.\n"
    )
