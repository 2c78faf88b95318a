"""Charts by matplotlib: lines and bars for a page, dots with intervals and shaded tables as files.

Equal data give equal bytes: ids are hashes with a salt of ours, and no file holds a date. On a page texts
take the page's colour, lines are grey, and what lies behind is seen: both themes of the page fit.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "0.55"
COLOURS = ("#4063d8", "#cb3c33", "#389826", "#9558b2", "#b58900", "#0f8b8d", "#c0579a", "#6b7280")
STYLE: dict[Any, Any] = {  # keys are of a type that matplotlib keeps to itself
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "revelio",
    "text.parse_math": False,  # a name with two dollars is no formula
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.color": GREY,
    "ytick.labelcolor": "black",
    "grid.color": GREY,
    "grid.alpha": 0.3,
}
DOTS = 100  # an inch: sizes in dots below
EDGE = 0.12  # inches around a picture
# Inches of a page's charts: the least, and what a name below a line and the value above a bar need.
WIDTH, PLACE, BAR = 4.6, 0.45, 0.26
READABLE = (
    1.4  # dots of the screen a point, below which letters are too small: a chart scrolls instead
)


@dataclass(frozen=True)
class Series:
    """One line or one colour of bars; ``lows`` and ``highs`` bound each value where known."""

    name: str
    values: Sequence[float | None]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()
    dashed: bool = False


def line_chart(title: str, labels: Sequence[str], series: Sequence[Series], unit: str) -> str:
    """Lines over equally spaced ``labels``, with a legend; intervals as faint whiskers. For a page."""
    with _figure(_width(PLACE * len(labels)), 2.6) as figure:
        axes = figure.subplots()
        places = np.arange(len(labels))
        for colour, one in _coloured(series):
            style = "--" if one.dashed else "-"
            axes.plot(places, _numbers(one.values), f"o{style}", color=colour, markersize=4.5)
            axes.vlines(places, *_interval(one, len(labels)), color=colour, alpha=0.6)
        _name_axes(axes, places, labels, unit)
        return _inline(figure, title, series)


def bar_chart(title: str, labels: Sequence[str], series: Sequence[Series], unit: str) -> str:
    """Groups of bars, a group a label and a bar a series, with whiskers and values. For a page."""
    with _figure(_width(BAR * len(labels) * len(series)), 2.6) as figure:
        axes = figure.subplots()
        places, wide = np.arange(len(labels)), 0.8 / max(len(series), 1)
        for number, (colour, one) in enumerate(_coloured(series)):
            middle = places + (number + 0.5) * wide - 0.4
            lows, highs = _interval(one, len(labels))
            values = _numbers(one.values)
            axes.bar(middle, values, 0.92 * wide, color=colour)
            axes.vlines(middle, lows, highs, color=GREY)
            for x, top, value in zip(middle, np.fmax(values, highs), values, strict=True):
                if not np.isnan(value):
                    axes.text(x, top, f"{value:.3g}", ha="center", va="bottom", fontsize=6.5)
        axes.set_ylim(bottom=0)
        _name_axes(axes, places, labels, unit)
        return _inline(figure, title, series)


def dot_chart(title: str, panels: Sequence[tuple[str, Sequence[str], Sequence[Series]]]) -> str:
    """An SVG file: panels below each other (unit, labels, series), a line a label, a dot a series.

    Intervals are whiskers; a dashed series is drawn as upright strokes.
    """
    lines = [len(labels) + 3 for _, labels, _ in panels]
    with _figure(8.6, 0.19 * sum(lines) + 0.6) as figure:
        rows = figure.subplots(len(panels), squeeze=False, height_ratios=lines)[:, 0]
        named = {}
        for axes, (unit, labels, series) in zip(rows, panels, strict=True):
            places = np.arange(len(labels))
            for colour, one in _coloured(series):
                marks = "|" if one.dashed else "o"
                values = _numbers(one.values)
                [named[one.name]] = axes.plot(
                    values, places, marks, color=colour, mew=2 if one.dashed else 0, alpha=0.85
                )
                axes.hlines(places, *_interval(one, len(labels)), color=colour)
            axes.set_yticks(places, labels)
            axes.set_ylim(len(labels) - 0.4, -0.6)
            axes.set_xlabel(unit, loc="right")
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x")
        heading = {"title": title, "title_fontsize": 10, "alignment": "left", "frameon": False}
        figure.legend(named.values(), named, loc="outside upper left", ncols=4, **heading)
        figure.set_facecolor("white")
        return _svg(figure)


def heat_map(
    shades: Float[np.ndarray, "r c"],
    texts: Sequence[Sequence[str]],
    names: tuple[Sequence[str], Sequence[str]],
    *,
    cell: tuple[int, int],
    dark: str,
    caption: str,
    font: float = 12,
    upright: bool = False,
    framed: tuple[int, int] | None = None,
) -> bytes:
    """A table of shades as a PNG file.

    Args:
        shades: from 0, white, to 1, ``dark``; NaN is left white.
        texts: of the cells.
        names: of the rows, on the left, and of the columns, above.
        cell: its width and height in dots.
        dark: the colour of 1.
        caption: below the table.
        font: the height of letters in dots.
        upright: the columns' names are read upwards.
        framed: row and column of the cell with a frame.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    high, wide = shades.shape
    points = font * 72 / DOTS
    with _figure(wide * cell[0] / DOTS, high * cell[1] / DOTS) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        colours = LinearSegmentedColormap.from_list("shades", ["white", dark])
        edges = "0.9" if cell[1] > 8 else "none"
        axes.pcolormesh(shades, cmap=colours, vmin=0, vmax=1, edgecolors=edges, linewidth=0.5)
        for (row, column), shade in np.ndenumerate(shades):
            if text := texts[int(row)][int(column)]:
                ink = "white" if shade > 0.55 else "black"
                drawn = axes.text(column + 0.5, row + 0.5, text, color=ink)
                drawn.set(fontsize=points, ha="center", va="center_baseline")
        if framed is not None:
            corner = (framed[1], framed[0])
            axes.add_patch(
                Rectangle(corner, 1, 1, fill=False, color="#d04818", lw=2, clip_on=False)
            )
        axes.set(xlim=(0, wide), ylim=(high, 0))
        axes.set_yticks(np.arange(len(names[0])) + 0.5, names[0])
        axes.set_xticks(np.arange(len(names[1])) + 0.5, names[1], rotation=90 if upright else 0)
        axes.tick_params(length=0, labelsize=points)
        axes.xaxis.tick_top()
        axes.spines[:].set_visible(False)
        # Not the axis's own label: that one moves with the names.
        axes.annotate(
            caption, (0, 0), (0, -18), xycoords="axes fraction", textcoords="offset points"
        )
        file, tight = BytesIO(), {"bbox_inches": "tight", "pad_inches": EDGE}
        figure.savefig(file, format="png", facecolor="white", metadata={"Software": None}, **tight)
        return file.getvalue()


@contextmanager
def _figure(width: float, height: float) -> "Iterator[Figure]":
    """A figure of so many inches, in our style: no window, no global state but for the while."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        # A sign that the font lacks is shown as a box, or, in an SVG, by the reader's own font.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield Figure((width, height), dpi=DOTS, facecolor="none", layout="constrained")


def _width(needed: float) -> float:
    return max(WIDTH, needed + 0.6)  # the axis is beside what is drawn


def _coloured(series: Sequence[Series]) -> Iterator[tuple[str, Series]]:
    return zip([COLOURS[i % len(COLOURS)] for i in range(len(series))], series, strict=True)


def _numbers(values: Sequence[float | None]) -> Float[np.ndarray, " n"]:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _interval(one: Series, count: int) -> tuple[Any, Any]:
    """Both ends, NaN where either is not known."""
    ends = [_numbers(end) if len(end) else np.full(count, np.nan) for end in (one.lows, one.highs)]
    low, high = np.where(np.isnan(ends).any(0), np.nan, ends)
    return low, high


def _name_axes(axes: "Axes", places: Any, labels: Sequence[str], unit: str) -> None:
    axes.set_facecolor("none")
    axes.set_xticks(places, labels)
    axes.set_ylabel(unit)
    axes.grid(axis="y")


def _svg(figure: "Figure") -> str:
    """The file's text, from its ``<svg`` on."""
    text = StringIO()
    figure.savefig(
        text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _inline(figure: "Figure", title: str, series: Sequence[Series]) -> str:
    """A figure of a page, as wide as there is room, with a legend that wraps; on a phone it scrolls.

    The ids of matplotlib's parts are left out: several charts stand on a page. Those that are used are
    hashes of what they name. Its style sheet would be the whole page's.
    """
    unwanted = r' id="[^"]*_\d+"|(?<=<svg )[^>]*(?=viewBox)|<defs>\s*<style.*?</style>\s*</defs>'
    body = re.sub(unwanted, "", _svg(figure), flags=re.DOTALL)
    named = escape(title)
    least = round(figure.get_figwidth() * 72 * READABLE)
    body = body.replace("<svg ", f'<svg role="img" aria-label="{named}" ', 1)
    body = f'<div style="overflow-x:auto"><div style="min-width:{least}px">{body}</div></div>'
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(one.name)}</span>'
        for colour, one in _coloured(series)
    )
    return (
        f'<figure><figcaption>{named}</figcaption>{body}<div class="legend">{legend}</div></figure>'
    )
