"""Small charts as SVG text: for a page, lines over timesteps and bars; as a file, dots with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 42
# Of the chart of dots: a line a label.
WIDE, NAMES, LINE = 860, 400, 17
COLOURS = ("#4063d8", "#cb3c33", "#389826", "#9558b2", "#b58900", "#0f8b8d", "#c0579a", "#6b7280")


@dataclass(frozen=True)
class Series:
    """One line or one colour of bars; ``lows`` and ``highs`` bound each value where known."""

    name: str
    values: Sequence[float | None]
    lows: Sequence[float | None] = ()
    highs: Sequence[float | None] = ()
    dashed: bool = False


def line_chart(title: str, labels: Sequence[str], series: Sequence[Series], unit: str) -> str:
    """Lines over equally spaced ``labels``, with a legend; intervals as faint whiskers."""
    low, high = _bounds(series, floor=None)
    step = (WIDTH - LEFT - RIGHT) / max(len(labels) - 1, 1)
    xs = [LEFT + i * step for i in range(len(labels))]
    parts = _frame(title, labels, xs, low, high, unit)
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        points = [
            (x, _y(v, low, high)) for x, v in zip(xs, one.values, strict=True) if v is not None
        ]
        dash = ' stroke-dasharray="5 4"' if one.dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts += _whiskers(xs, one, low, high, colour)
    return _svg(title, parts, series)


def bar_chart(title: str, labels: Sequence[str], series: Sequence[Series], unit: str) -> str:
    """Groups of bars, one group a label and one bar a series, with interval whiskers."""
    low, high = _bounds(series, floor=0.0)
    group = (WIDTH - LEFT - RIGHT) / max(len(labels), 1)
    bar = group * 0.8 / max(len(series), 1)
    centres = [LEFT + group * (i + 0.5) for i in range(len(labels))]
    parts = _frame(title, labels, centres, low, high, unit)
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        xs = [c - group * 0.4 + bar * (number + 0.5) for c in centres]
        for x, value in zip(xs, one.values, strict=True):
            if value is None:
                continue
            y = _y(value, low, high)
            parts.append(
                f'<rect x="{x - bar * 0.46:.1f}" y="{y:.1f}" width="{bar * 0.92:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{colour}">'
                f"<title>{escape(one.name)}: {value:.3g} {escape(unit)}</title></rect>"
            )
        parts += _whiskers(xs, one, low, high, "currentColor")
    return _svg(title, parts, series)


def dot_chart(title: str, panels: Sequence[tuple[str, Sequence[str], Sequence[Series]]]) -> str:
    """An SVG file: panels below each other (unit, labels, series), a line a label, a dot a series.

    Intervals are whiskers; a dashed series is drawn as upright strokes.
    """
    parts = [f"<title>{escape(title)}</title>", f'<text x="8" y="20">{escape(title)}</text>']
    named = {
        one.name: (number, one.dashed)
        for _, _, series in panels
        for number, one in enumerate(series)
    }
    for name, (number, dashed) in named.items():
        x = 20 + 160 * number
        parts.append(_mark(x, 38, COLOURS[number], dashed=dashed))
        parts.append(f'<text x="{x + 10}" y="42">{escape(name)}</text>')
    top = 52
    for unit, labels, series in panels:
        parts += _dots(top, unit, labels, series)
        top += LINE * (len(labels) + 3)
    style = "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {top}" role="img">'
        f"<style>{style}</style>"
        f'<rect width="{WIDE}" height="{top}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _dots(top: int, unit: str, labels: Sequence[str], series: Sequence[Series]) -> list[str]:
    low, high = _bounds(series, floor=None)
    bottom = top + LINE * (len(labels) + 1)

    def x(value: float) -> float:
        return NAMES + (WIDE - NAMES - RIGHT) * (value - low) / (high - low)

    parts = []
    for tick in ticks(low, high):
        at = f"{x(tick):.1f}"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{top}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{at}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{NAMES - 8}" y="{bottom + 14}" text-anchor="end">{escape(unit)}</text>')
    for row, label in enumerate(labels):
        y = top + LINE * (row + 1)
        parts.append(f'<text x="{NAMES - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        for colour, one in zip(COLOURS, series, strict=False):
            ends = [end[row] for end in (one.lows, one.highs) if end]
            if len(ends) == 2 and None not in ends:
                left, right = (x(end) for end in ends if end is not None)
                parts.append(
                    f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke="{colour}"/>'
                )
            if (value := one.values[row]) is not None:
                parts.append(_mark(x(value), y, colour, dashed=one.dashed))
    return parts


def _mark(x: float, y: float, colour: str, *, dashed: bool) -> str:
    if dashed:
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 6}"'
        return f'<line {ends} stroke="{colour}" stroke-width="2" stroke-dasharray="3 2"/>'
    return f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.8"/>'


def _bounds(series: Sequence[Series], floor: float | None) -> tuple[float, float]:
    found = [v for s in series for vs in (s.values, s.lows, s.highs) for v in vs if v is not None]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    margin = (high - low) * 0.08 or 0.5
    return (low - margin if floor is None else floor), high + margin


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from ``low`` to ``high``, steps of 1, 2 or 5 times a power of ten, ``most`` or fewer."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for step in (power * one for one in (0.5, 1, 2, 5, 10)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        # The smallest step that gives few enough; one that is 2.5 times as large leaves one at least.
        if last - first < most:
            break
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _y(value: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)


def _frame(
    title: str, labels: Sequence[str], xs: Sequence[float], low: float, high: float, unit: str
) -> list[str]:
    parts = [f"<title>{escape(title)}</title>"]
    for value in ticks(low, high):
        y = _y(value, low, high)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    parts += [
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(label)}</text>'
        for x, label in zip(xs, labels, strict=True)
    ]
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(unit)}</text>"
    )
    return parts


def _whiskers(xs: Sequence[float], one: Series, low: float, high: float, colour: str) -> list[str]:
    return [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(a, low, high):.1f}" y2="{_y(b, low, high):.1f}" '
        f'stroke="{colour}" stroke-width="1.2" opacity="0.7"/>'
        for x, a, b in zip(xs, one.lows, one.highs, strict=False)
        if a is not None and b is not None
    ]


def _svg(title: str, parts: Sequence[str], series: Sequence[Series]) -> str:
    legend = "".join(
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(s.name)}</span>'
        for i, s in enumerate(series)
    )
    body = "".join(parts)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">{body}</svg><div class="legend">{legend}</div></figure>'
    )
