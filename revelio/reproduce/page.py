"""A reproduced item as Markdown: every row beside the paper's value, every ordering, what is missing.

And as a picture: for every row the paper's value, ours with its interval, and chance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from revelio.charts import Series, dot_chart
from revelio.probes.config import ProbeName
from revelio.reproduce.row import SECONDS
from revelio.text_tables import markdown_table
from revelio.trust import markdown
from revelio.wording import plural

# Rows that differ in the classifier alone.
PROBES = get_args(ProbeName)
HEAD = ("model", "layer", "t", "data", "prompt", "metric", "paper", "ours", "95 %", "chance")


def page(result: Mapping[str, Any], drawn: str = "") -> str:
    """The page of what ``<item>.json`` holds; ``drawn``: where its picture is, beside the page."""
    rows = result["rows"]
    done = [row for row in rows if "missing" not in row]
    lines = [f"# {result['item']}: {result['title']}", ""]
    if result["commands"]:
        lines += ["Made by the LLaVA extension:", "", *map("    {}".format, result["commands"])]
    else:
        lines.append(
            f"Scale {result['scale']}, mode {result['mode']}, {plural(result['seeds'], 'training')} a row. "
            "Where another model or data set stands in for the paper's, only the orderings can be compared, "
            "not the values."
        )
    if done:
        lines += ["", markdown_table([HEAD, *map(_row, done)]), *_speed_ups(done)]
    lines += ["", f"![paper, ours and chance]({drawn})"] if drawn else []
    if any(row.get("controls") for row in done):
        lines += ["", "Beside control dictionaries, by sigma_label, first training:", ""]
        lines += [f"- {_where(row)}: {row['controls']}" for row in done if row.get("controls")]
    shown = [line for row in done for line in _shown(row)]
    lines += ["", *shown] if shown else []
    if result["orderings"]:
        head = ("the paper claims", "rows", "in its values", "in ours", "probability", "by chance")
        claims = [(*head, "verdict"), *map(_ordering, result["orderings"])]
        lines += ["", markdown_table(claims), "", METHOD]
    lacking = [row for row in rows if "missing" in row]
    if lacking:
        lines += ["", f"Rows that could not run, {len(lacking)} of {len(rows)}:", ""]
        lines += [
            f"- {_where(row)} (paper: {_number(row['paper'])}): {markdown(row['missing'])}"
            for row in lacking
        ]
    return "\n".join([*lines, ""])


METHOD = (
    "Probability: the share of replicates in which the ordering holds, trainings drawn with repetition and "
    "test images by the delete-d jackknife; holds from 0.95 on, does not hold up to 0.05, and one training "
    "settles nothing. By chance: how "
    "often it would hold if our values were dealt to the rows at random."
)


def _speed_ups(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many times as fast as the Diffusion Classifier everything else is on this machine (Sec. 4.7)."""
    timed = {row["kind"]: row for row in rows if row["metric"] == SECONDS}
    slow = timed.pop("diffusion-classifier", None)
    if slow is None:
        return []
    lines = [
        "",
        f"Against the Diffusion Classifier's {plural(slow['value'], 'second', form='.3g')} an image:",
        "",
    ]
    for kind, row in timed.items():
        times = f"{slow['value'] / row['value']:,.0f} times as fast"
        if row["paper"]:
            own = slow["paper"] / row["paper"]
            times += f" (paper: {slow['paper']:g} and {row['paper']:g} s, {own:,.0f} times)"
        lines.append(f"- {kind}, {plural(row['value'], 'second', form='.3g')}: {times}")
    return lines


def _shown(row: Mapping[str, Any]) -> list[str]:
    """Lines on the pictures of a row."""
    lines = [f"- [{_where(row)}]({row['gallery']})"] if "gallery" in row else []
    lines += [f"- [{_where(row)}: the maps]({row['sheet']})"] if "sheet" in row else []
    for name, share in row.get("shows", {}).items():
        lines.append(
            f"- {markdown(row['our_model'])} {name}: three components hold {share:.1%} of the variance"
        )
    return lines


def _row(row: Mapping[str, Any]) -> list[str]:
    interval = row.get("interval")
    layers = "+".join(row["our_layers"])
    return [
        _pair(row["model"], row["our_model"]),
        _pair(row["layer"], layers),
        "" if row["timestep"] is None else str(row["timestep"]),
        _pair(row["dataset"], row["our_data"]),
        row["prompt"],
        f"{row['metric']} ({row['kind']})" if row["kind"] in PROBES else row["metric"],
        _number(row["paper"]),
        _number(row.get("value")),
        "" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}",
        _number(row.get("chance")),
    ]


def _ordering(entry: Mapping[str, Any]) -> list[str]:
    judged, (some, of) = "probability" in entry, entry["rows"]
    return [
        entry["text"],
        f"{some} of {of}",
        _yes(entry["paper"]),
        _yes(entry.get("holds")),
        f"{entry['probability']:.2f}" if judged else "",
        f"{entry['by_chance']:.2f}" if judged else "",
        entry["verdict"],
    ]


def _pair(paper: str, ours: str) -> str:
    return paper if paper == ours else f"{paper} ({markdown(ours)})"


def _where(row: Mapping[str, Any]) -> str:
    t = "" if row["timestep"] is None else f"t={row['timestep']}"
    parts = (row["model"], row["layer"], t, row["dataset"], row["prompt"], row["metric"])
    return " ".join(part for part in parts if part)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"


def _yes(value: bool | None) -> str:
    return "" if value is None else ("yes" if value else "no")


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
