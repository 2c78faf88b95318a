"""A reproduced item as a picture: for every row the paper's value, ours with its interval, and chance."""

from collections.abc import Mapping, Sequence
from typing import Any

from revelio.charts import Series, dot_chart
from revelio.reproduce.page import PROBES


def picture(result: Mapping[str, Any]) -> str | None:
    """An SVG file of what ``<item>.json`` holds, a panel a metric; None where nothing was measured."""
    by_metric: dict[str, list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        if row.get("value") is not None:
            by_metric.setdefault(row["metric"], []).append(row)
    if not by_metric:
        return None
    panels = [
        (metric, [_label(row) for row in rows], _series(rows)) for metric, rows in by_metric.items()
    ]
    return dot_chart(f"{result['item']}: {result['title']}", panels)


def _series(rows: Sequence[Mapping[str, Any]]) -> list[Series]:
    ends = [row.get("interval") or (None, None) for row in rows]
    return [
        Series("paper", [row["paper"] for row in rows]),
        Series(
            "ours, 95 % interval",
            [row["value"] for row in rows],
            [low for low, _ in ends],
            [high for _, high in ends],
        ),
        Series("chance", [row.get("chance") for row in rows], dashed=True),
    ]


def _label(row: Mapping[str, Any]) -> str:
    t = "" if row["timestep"] is None else f"t={row['timestep']}"
    layers = "+".join(row["our_layers"])
    probe = row["kind"] if row["kind"] in PROBES else ""
    return " ".join(
        part
        for part in (row["our_model"], layers, t, row["our_data"], row["prompt"], probe)
        if part
    )
