"""Tables of text: the same plain columns, whatever cells hold and however narrow the terminal is."""

from unicodedata import east_asian_width

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from revelio.text_tables import columns, markdown_table

CELLS = st.text(st.sampled_from("ab [/]:é人\\*_`"), max_size=30).map(str.rstrip)


def width(text: str) -> int:
    return sum(1 + (east_asian_width(sign) == "W") for sign in text)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5),
    st.sampled_from(["l", "lr", "rlr"]),
)
def test_columns_are_padded_cells(rows, align) -> None:
    widths = [max(width(row[place]) for row in rows) for place in range(3)]
    sides = {"l": "lll", "lr": "lrr", "rlr": "rlr"}[align]
    wanted = []
    for row in rows:
        cells = []
        for cell, wide, side in zip(row, widths, sides, strict=True):
            blank = " " * (wide - width(cell))
            cells.append(blank + cell if side == "r" else cell + blank)
        wanted.append("  ".join(cells).rstrip())
    assert columns(rows, align).split("\n") == wanted


def test_no_terminal_cuts_or_colours_a_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    row = ("[bold]a[/bold]", ":smile:", "x" * 300)
    assert columns([row]) == "  ".join(row)
    assert columns([]) == "" and capsys.readouterr().out == ""


def test_markdown_has_a_rule_below_its_head() -> None:
    assert markdown_table([("a", "b"), ("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    wide = [("a", "b", "c", "d")]
    assert markdown_table(wide, "lrl").splitlines()[1] == "|---|---:|---|---|"
    assert markdown_table(wide, "lr").splitlines()[1] == "|---|---:|---:|---:|"
    assert markdown_table([("a",)], "lrl").splitlines()[1] == "|---|"
