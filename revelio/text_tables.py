"""Rows of text as a table: columns below each other, or Markdown."""

from collections.abc import Sequence
from io import StringIO

WIDE = 1_000_000  # no line is folded or cut, however narrow the terminal


def columns(rows: Sequence[Sequence[str]], align: str = "l") -> str:
    """Cells below each other, two blanks apart: the same plain text in a terminal, a pipe and a file.

    Args:
        rows: of equal length; the first may be a head. Cells are shown as they are, without markup.
        align: ``l`` or ``r`` a column, the last letter for all columns after it.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for column in range(len(rows[0]) if rows else 0):
        right = align[min(column, len(align) - 1)] == "r"
        table.add_column(justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    text = StringIO()
    console = Console(file=text, width=WIDE, color_system=None, force_jupyter=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def markdown_table(rows: Sequence[Sequence[str]], align: str = "l") -> str:
    """A table of Markdown; the first row is its head.

    Args:
        rows: of equal length. Cells are shown as they are: escape what is foreign.
        align: ``l`` or ``r`` a column, the last letter for all columns after it.
    """
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    sides = align.ljust(len(rows[0]), align[-1])[: len(rows[0])]
    rule = "".join("---:|" if side == "r" else "---|" for side in sides)
    return "\n".join([head, f"|{rule}", *others])
