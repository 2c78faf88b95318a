"""Charts: where values are drawn, equal bytes for equal data, shades and captions of tables."""

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from revelio.charts import COLOURS, Series, bar_chart, dot_chart, heat_map, line_chart


def points(path: str) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"[-\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def drawn(chart: str, colour: str, attribute: str) -> list[list[tuple[float, float]]]:
    """The paths of a chart whose fill or stroke is the colour."""
    pattern = rf'<path d="([^"]+)"[^>]*style="[^"]*{attribute}: {colour}'
    return [points(path) for path in re.findall(pattern, chart)]


def test_lines_and_bars_are_in_proportion() -> None:
    line = line_chart("T", ["a", "b", "c"], [Series("s", [0.0, 0.5, 1.0])], "share")
    [(xs, ys)] = [
        list(zip(*one, strict=True)) for one in drawn(line, COLOURS[0], "stroke") if len(one) == 3
    ]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=1e-3)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=1e-3) and ys[0] > ys[2]
    both = [Series("s", [2.0, None]), Series("<r>", [4.0, 1.0], [3.0, None], [5.0, None])]
    bars = bar_chart("T", ["a", "b"], both, "percent")
    heights = []
    for colour in COLOURS[:2]:
        # What has no value is a path of one point.
        bars_of = [[y for _, y in bar] for bar in drawn(bars, colour, "fill") if len(bar) == 4]
        heights += [max(bar) - min(bar) for bar in bars_of]
    assert np.array(heights) / heights[-1] == pytest.approx([2, 4, 1], rel=1e-3)
    assert "&lt;r&gt;" in bars and "<r>" not in bars
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", bars)
    assert [text for text in texts if text in ("2", "4", "1")][-3:] == ["2", "4", "1"]


def test_a_charts_bytes_are_its_datas_and_its_ids_are_of_use() -> None:
    some = [
        Series("$a$", [1.0, 2.0], [0.5, 1.5], [1.5, 2.5]),
        Series("人物", [2.0, 1.0], dashed=True),
    ]
    panels = [("share", ["x", "y"], some), ("nats", ["x", "y"], some[:1])]
    for chart in (
        lambda: line_chart("T", ["t=1", "t=2"], some, "u"),
        lambda: bar_chart("T", ["t=1", "t=2"], some, "u"),
        lambda: dot_chart("T", panels),
    ):
        assert chart() == chart()
    page = line_chart("T", ["t=1", "t=2"], some, "u") + bar_chart("T", ["t=1", "t=2"], some, "u")
    assert "$a$" in page and "人物" in page and "<style" not in page and "<metadata" not in page
    named, used = set(re.findall(r' id="([^"]+)"', page)), re.findall(r"#([mp]\w{10})\b", page)
    assert named == set(used)
    tops = re.findall(r"<svg [^>]*>", page)
    assert len(tops) == 2 and all("viewBox" in top and "width" not in top for top in tops)
    ElementTree.fromstring(dot_chart("T", panels))


def test_a_table_of_shades_has_its_colours_where_its_values_are() -> None:
    shades = np.array([[1.0, 0.0, np.nan], [0.5, 0.0, 1.0]])
    names = (["one", "a longer name"], ["x", "y", "z"])
    options = {"cell": (60, 40), "dark": "#14346e", "caption": "c" * 60, "framed": (0, 1)}
    file = heat_map(shades, [["", "", ""], ["", "", ""]], names, **options)
    assert file == heat_map(shades, [["", "", ""], ["", "", ""]], names, **options)
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    dark = np.abs(pixels - (0x14, 0x34, 0x6E)).max(-1) == 0
    rows, columns = np.nonzero(dark)
    corner = np.array([rows.min(), columns.min()])
    cells = {
        ((r - corner[0]) // 40, (c - corner[1]) // 60) for r, c in zip(rows, columns, strict=True)
    }
    assert cells == {(0, 0), (1, 2)} and dark.sum() > 0.9 * 2 * 60 * 40
    middle = pixels[corner[0] + 60, corner[1] + 30]
    assert middle == pytest.approx((255 + np.array((0x14, 0x34, 0x6E))) / 2, abs=2)
    # A frame around the cell without a shade, one that has no value left white.
    assert (np.abs(pixels - (0xD0, 0x48, 0x18)).max(-1) < 20).any()
    assert (pixels[corner[0] + 20, corner[1] + 150] == 255).all()
    # All ink ends before the picture does.
    ink = pixels.min(-1) < 250
    assert (
        not ink[:8].any() and not ink[-8:].any() and not ink[:, :8].any() and not ink[:, -8:].any()
    )
