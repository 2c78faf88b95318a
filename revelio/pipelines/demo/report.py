"""``report.json`` -> ``report.html``: the tables, the curves, the settings and the times, on one page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revelio.analysis.paired import strongest
from revelio.charts import Series, bar_chart, line_chart
from revelio.pages import render_page
from revelio.run_dir import write_whole


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Render ``report`` (what ``report.json`` holds) as one page that needs no network."""
    values = {
        "report": report,
        "layers": _ordered(report["purity"], "layer"),
        "timesteps": _ordered(report["purity"], "timestep"),
        "cell": {(row["layer"], row["timestep"]): row for row in report["purity"]},
        "shade": _shades(report["purity"]),
        "charts": charts(report),
        "controls": [row for row in report["purity"] if row.get("controls")],
        "held_out": held_out_rows(report),
    }
    write_whole(path, render_page("revelio.pipelines.demo", "report.html.j2", values))


def held_out_rows(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], Any]]:
    """A measure a row: its name, the k-SAE of cells on held-out pictures, and the strongest control."""
    found = (report.get("cells") or {}).get("held_out")
    measures = found["measures"] if found else {}
    return [(name, one, strongest(one)) for name, one in measures.items()]


def charts(report: Mapping[str, Any]) -> list[str]:
    """The curves of the report, as SVG."""
    drawn = []
    purity = [row for row in report["purity"] if row["majority_share"] is not None]
    if purity and len(_ordered(purity, "timestep")) > 1:
        drawn.append(_purity_chart(purity, report.get("pixels")))
    if report["diffc"]:
        drawn.append(_diffc_chart(report["diffc"]))
    return drawn


def _purity_chart(
    purity: Sequence[Mapping[str, Any]], pixels: Mapping[str, Any] | None = None
) -> str:
    timesteps = _ordered(purity, "timestep")
    rows = {(row["layer"], row["timestep"]): row for row in purity}
    series = []
    for layer in _ordered(purity, "layer"):
        line = [rows.get((layer, t)) for t in timesteps]
        bounds = [row["interval"]["majority_share"] if row else (None, None) for row in line]
        shares = [row["majority_share"] if row else None for row in line]
        series.append(Series(layer, shares, [b[0] for b in bounds], [b[1] for b in bounds]))
    if pixels and pixels["majority_share"] is not None:
        series.append(
            Series("raw pixels", [pixels["majority_share"]] * len(timesteps), dashed=True)
        )
    chance = [purity[0]["majority_share_chance"]] * len(timesteps)
    series.append(Series("chance", chance, dashed=True))
    title = "Majority share of the latents' top images, by timestep"
    return line_chart(title, [f"t={t}" for t in timesteps], series, "majority share")


def _diffc_chart(diffc: Sequence[Mapping[str, Any]]) -> str:
    labels = [f"{row['layer']}\nt={row['timestep']}" for row in diffc]

    def bars(name: str, key: str, interval: str) -> Series:
        bounds = [row.get(interval) or [None, None] for row in diffc]
        return Series(
            name, [row[key] for row in diffc], [b[0] for b in bounds], [b[1] for b in bounds]
        )

    series = [
        bars("trained model", "top1", "interval"),
        bars("random weights", "random_weights_top1", "random_weights_interval"),
        bars("raw pixels", "pixels_top1", "pixels_interval"),
    ]
    return bar_chart("Diff-C top-1 accuracy on held-out images", labels, series, "percent")


def _ordered(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _shades(purity: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, Any], float]:
    """How strongly to shade each cell: 0 at the least pure, 1 at the purest."""
    known = [row["majority_share"] for row in purity if row["majority_share"] is not None]
    if not known:
        return {}
    low, high = min(known), max(known)
    return {
        (row["layer"], row["timestep"]): (row["majority_share"] - low) / ((high - low) or 1.0)
        for row in purity
        if row["majority_share"] is not None
    }
