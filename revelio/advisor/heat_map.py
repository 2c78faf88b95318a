"""The heat map of an advice: layers downwards, passes of the model to the right, a shade a value."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from revelio import charts

CELL_WIDTH, CELL_HEIGHT, FONT, SIGN = 82, 30, 13, 9  # dots; of a sign in a column's name, too
DARK = "#104e8b"


def heat_map(
    values: Mapping[tuple[str, str], tuple[float, int]],
    rows: Sequence[str],
    columns: Sequence[str],
    chosen: tuple[str, str],
    note: str,
    form: str = "{:.0%}",
) -> bytes:
    """Draw a table of values; the bytes of a PNG file.

    Args:
        values: by row and column, the value and on how many images it was measured; some may lack.
        rows: their names, from above.
        columns: the same.
        chosen: the cell that is framed.
        note: below the table.
        form: how a value is written.
    """
    shades = np.full((len(rows), len(columns)), np.nan)
    texts = [[""] * len(columns) for _ in rows]
    for (row, column), (value, images) in values.items():
        y, x = rows.index(row), columns.index(column)
        shades[y, x], texts[y][x] = value, f"{form.format(value)} / {images}"
    low, high = np.nanmin(shades), np.nanmax(shades)
    return charts.heat_map(
        (shades - low) / ((high - low) or 1.0), texts, (rows, columns),
        cell=(max(CELL_WIDTH, *(SIGN * len(name) for name in columns)), CELL_HEIGHT), dark=DARK,
        caption=note, font=FONT, framed=(rows.index(chosen[0]), columns.index(chosen[1])),
    )  # fmt: skip


def short(model: str) -> str:
    """A model's name without the folders above it."""
    return Path(model).name or model
