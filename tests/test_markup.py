"""Names from data sets (classes, files, layers) reach the pages as text, never as markup."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from revelio.charts import Series, bar_chart, line_chart
from revelio.trust import markdown, printable

ROOT = Path(__file__).parents[1] / "revelio"
NASTY = '</title></text></script><img src=x onerror="alert(1)">\'&'
# What makes markup or code of a text in a browser.
SINKS = r"(innerHTML|outerHTML|insertAdjacentHTML|document\.write|srcdoc|DOMParser|\beval\(|new Function)"


class Cells(HTMLParser):
    """The tags of a page, and the text of each cell of its tables."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data if data.strip() else ""


class Tags(HTMLParser):
    """The tags and the names of attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("chart", [line_chart, bar_chart])
def test_charts_hold_names_as_text(chart) -> None:
    series = [Series(NASTY, [0.1, 0.5]), Series("b", [0.2, 0.3])]
    page = Tags()
    page.feed(chart(NASTY, [NASTY, "t=1"], series, NASTY))
    plain = Tags()
    plain.feed(chart("title", ["t=0", "t=1"], [Series("a", [0.1, 0.5]), series[1]], "unit"))
    assert page.tags == plain.tags and page.attributes == plain.attributes
    assert "img" not in page.tags and not any(name.startswith("on") for name in page.attributes)


def test_scripts_and_templates_make_no_markup_of_text() -> None:
    sources = [*ROOT.rglob("*.js"), *ROOT.rglob("*.html"), *ROOT.rglob("*.j2")]
    assert len(sources) > 8
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(SINKS, text), path
        # Charts alone are markup of our own; the test above is theirs.
        assert {use.strip() for use in re.findall(r"{{([^}]*\|\s*safe)", text)} <= {"chart | safe"}


@settings(max_examples=50)
@given(st.text(max_size=60))
@example(f"| x |\n# {NASTY}")
@example("[a](javascript:alert(1)) `x` ![b](http://evil.example)")
def test_a_name_in_a_markdown_page_is_shown_as_it_is(name: str) -> None:
    """By a Markdown reader of its own: a table of one row stays one, and the cell's text is the name's."""
    page = f"| a | b |\n|---|---|\n| x{markdown(name)}x | 1 |\n"
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(page)
    found = Cells()
    found.feed(html)
    assert found.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    shown = " ".join(f"x{printable(name)}x".split())
    assert [" ".join(cell.split()) for cell in found.cells] == ["a", "b", shown, "1"]


def test_styles_are_whole() -> None:
    """A browser passes over what it cannot read without a word: braces match, nothing is left of a merge."""
    sources = [*ROOT.rglob("*.css"), *ROOT.rglob("*.js")]
    assert len(sources) > 8
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^(<{7}|={7}|>{7})", text, re.MULTILINE), path
        assert path.suffix == ".js" or text.count("{") == text.count("}"), path
