"""What `steer-eval` found, as a page and as a table for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revelio.charts import Series, line_chart
from revelio.pages import render_page
from revelio.run_dir import write_whole
from revelio.text_tables import markdown_table
from revelio.wording import plural

COLUMNS = (
    "target: pictures of prompts that name it in which it shows. others: pictures of other prompts in which "
    "the judge sees what they name; survival: divided by the unsteered rate. turned into it: pictures of "
    "other prompts in which the target shows. distance: of the others' pictures from the unsteered ones, "
    "mean absolute difference of pixels, of 1; features: 1 - cosine of a backbone's activations. time: of a "
    "picture, and divided by the plain model's."
)
RATES = {
    "target": "target",
    "others": "others",
    "survival": "survival",
    "turned into it": "turned_into",
}


def write_page(report: Mapping[str, Any], path: Path, sheet: str) -> None:
    """Write the page; ``sheet`` is the picture beside it."""
    values = {
        "report": report,
        "targets": ", ".join(report["config"]["target"]),
        "table": table(report),
        "groups": group_table(report),
        "charts": [curve(report, what) for what in ("target", "others")],
        "columns": COLUMNS,
        "counts": counts(report),
        "sheet": sheet,
    }
    write_whole(path, render_page("revelio.pipelines", "steering.html.j2", values))


def counts(report: Mapping[str, Any]) -> str:
    """How many pictures the rates are of."""
    of, each = report["prompts"], plural(report["config"]["images_per_prompt"], "picture")
    named = plural(of["target"], "prompt that names", "prompts that name")
    return f"{named} the target and {plural(of['others'], 'other')}, {each} each"


def markdown(report: Mapping[str, Any]) -> str:
    """For the terminal: how many pictures it is of, the table, and that of the groups, if several."""
    tables = [table(report), *([group_table(report)] if len(group_table(report)[0]) > 3 else [])]
    head = f"percentages [95 % intervals]: {counts(report)}"
    return "\n\n".join((head, *(markdown_table(one) for one in tables)))


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """A row a method, after the head."""
    features = "features_distance" in report["methods"][0]
    head = ["method", "strength", *RATES, "distance", *(["features"] if features else []), "time"]
    rows = [head]
    for one in report["methods"]:
        cells = _named(one) + [percents(one[name]) for name in RATES.values()]
        cells.append(f"{one['distance']['value']:.3f}")
        cells += [f"{one['features_distance']['value']:.3f}"] if features else []
        rows.append([*cells, f"{one['seconds']:.2f} s, x{one['time_ratio']:.2f}"])
    return rows


def group_table(report: Mapping[str, Any]) -> list[list[str]]:
    """The target's rate in each group of its prompts, a row a method, after the head."""
    groups = list(report["methods"][0]["groups"])
    rows = [_named(one) + [percents(one["groups"][name]) for name in groups]
            for one in report["methods"]]  # fmt: skip
    return [["method", "strength", *groups], *rows]


def curve(report: Mapping[str, Any], what: str) -> str:
    """A rate over the strength, a line a steering; what has no strength is level."""
    methods = report["methods"]
    strengths = sorted({one["strength"] for one in methods if one["strength"]})
    lines: dict[str, dict[float, Mapping[str, float]]] = {}
    for one in methods:
        places = [one["strength"]] if one["strength"] else strengths
        lines.setdefault(one["method"], {}).update({place: one[what] for place in places})
    series = [
        Series(
            name,
            *(
                [100 * of[s][bound] if s in of else None for s in strengths]
                for bound in ("value", "low", "high")
            ),
            dashed=name in ("plain", "negative prompt"),
        )
        for name, of in lines.items()
    ]
    title = {"target": "The target's rate by strength", "others": "The others' rate by strength"}[
        what
    ]
    return line_chart(title, [f"{s:g}" for s in strengths], series, "percent")


def percents(entry: Mapping[str, float] | None) -> str:
    """A share with its interval, in percent."""
    if entry is None:
        return "none to compare with"
    value, low, high = (100 * entry[name] for name in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _named(one: Mapping[str, Any]) -> list[str]:
    name = f"{one['method']} ({one['about']})" if one["about"] else one["method"]
    return [name, f"{one['strength']:g}" if one["strength"] else ""]
