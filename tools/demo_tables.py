"""The demo's report as README and docs/measured.md show it, from ``docs/demo.json``."""

from collections import Counter
from typing import Any

from revelio.evaluation.page import table as evaluation_table


def demo_lines(report: dict[str, Any]) -> str:
    """What the demo's own page says first, and what the controls say of its k-SAEs."""
    said = "\n".join(f"- **{found['value']}** {found['text']}" for found in report["findings"])
    return (
        f"`make demo`, {report['model']} on {report['images']:,} pictures, "
        f"{sum(report['seconds'].values()) / 60:.1f} minutes on two CPU cores:\n\n{said}\n"
        f"- Of {len(report['purity'])} k-SAEs, by the intervals of the differences: "
        f"{_verdicts(report['purity'])}\n"
    )


def demo_tables(report: dict[str, Any]) -> str:
    """Majority share by layer and timestep, and Diff-C beside its baselines."""
    timesteps = list(dict.fromkeys(row["timestep"] for row in report["purity"]))
    layers = list(dict.fromkeys(row["layer"] for row in report["purity"]))
    cell = {(row["layer"], row["timestep"]): row for row in report["purity"]}
    chance = report["purity"][0]["majority_share_chance"]
    lines = [
        f"`make demo`: {report['model']} on {report['images']:,} pictures ({report['dataset']}), mode "
        f"`{report['mode']}`, {sum(report['seconds'].values()) / 60:.1f} minutes on two CPU cores. "
        "Majority share of the latents' ten top images (95 % interval, "
        f"{report['purity'][0]['interval_method'].removeprefix('95 % ')}; the number of latents; chance "
        f"{chance:.3f}):",
        "",
        "| layer | " + " | ".join(f"t = {t}" for t in timesteps) + " |",
        "|---|" + "---|" * len(timesteps),
    ]
    for layer in layers:
        lines.append(f"| {layer} | " + " | ".join(_share(cell[layer, t]) for t in timesteps) + " |")
    if report.get("pixels"):
        lines.append(f"| raw pixels | {_share(report['pixels'])} |" + " |" * (len(timesteps) - 1))
    if all(row.get("controls") for row in report["purity"]):
        lines += _controls(report["purity"])
    if (report.get("cells") or {}).get("held_out"):
        lines += _held_out(report)
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


def _held_out(report: dict[str, Any]) -> list[str]:
    """The k-SAE of cells on held-out pictures."""
    found, shown = report["cells"]["held_out"], report["shown"]
    return [
        "",
        f"The k-SAE of the cells of {shown['layer']}, t = {shown['timestep']}, which the gallery shows, on "
        f"{found['images']:,} held-out pictures ({found['method']}; one training, whose chance the "
        "intervals do not hold):",
        "",
        evaluation_table(found["measures"]),
    ]


def _controls(rows: list[dict[str, Any]]) -> list[str]:
    """The same measure for control dictionaries, and what the intervals support."""
    names = list(rows[0]["controls"])
    lines = [
        "",
        "The same for control dictionaries of the same size, which no training of an autoencoder found; in "
        f"brackets the k-SAE minus the control ({rows[0]['controls_method']}). What the intervals say of the "
        f"k-SAE, by layer and timestep: {_verdicts(rows)}. The pictures are those that the k-SAEs, and the "
        "model, were trained on.",
        "",
        "| layer, t | k-SAE | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = [_control(row["controls"][name]["majority"]) for name in names]
        share = f"{row['majority_share']:.3f}"
        lines.append(f"| {row['layer']}, {row['timestep']} | {share} | {' | '.join(cells)} |")
    return lines


def _verdicts(rows: list[dict[str, Any]]) -> str:
    said = [row["verdict"]["majority"] for row in rows]
    some = "not told apart from one control or several"
    verdicts = Counter(some if one.startswith("not told apart") else one for one in said)
    return "; ".join(f"{words} in {count}" for words, count in verdicts.most_common())


def _control(entry: dict[str, Any]) -> str:
    low, high = entry["difference"]["interval"]
    return f"{entry['value']:.3f} ({low:+.3f} to {high:+.3f})"


def _share(row: dict[str, Any]) -> str:
    low, high = row["interval"]["majority_share"]
    return f"{row['majority_share']:.3f} ({low:.3f} to {high:.3f}; {row['latents']})"


def _top1(row: dict[str, Any], prefix: str) -> str:
    low, high = row[f"{prefix}interval"]
    return f"{row[f'{prefix}top1']:.1f} ({low:.1f} to {high:.1f})"
