"""The heat map of an advice: layers downwards, passes of the model to the right, a shade a value."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL_WIDTH, CELL_HEIGHT, SIZE, EDGE = 78, 30, 13, 14
PAPER, INK, DARK, CHOSEN = (255, 255, 255), (34, 34, 34), (16, 78, 139), (208, 72, 24)


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
    font = ImageFont.load_default(size=SIZE)
    wide = max((font.getlength(name) for name in rows), default=0)
    cell = int(max(CELL_WIDTH, *(font.getlength(name) + 12 for name in columns)))
    left, top = int(wide) + 2 * EDGE, SIZE + 2 * EDGE
    width = max(left + cell * len(columns), int(font.getlength(note))) + 2 * EDGE
    image = Image.new("RGB", (width, top + CELL_HEIGHT * len(rows) + SIZE + 2 * EDGE), PAPER)
    draw = ImageDraw.Draw(image)
    shown = [value for value, _ in values.values()]
    low, high = min(shown), max(shown)
    for x, column in enumerate(columns):
        draw.text((left + (x + 0.5) * cell, top - EDGE), column, INK, font, "mm")
    for y, row in enumerate(rows):
        middle = top + (y + 0.5) * CELL_HEIGHT
        draw.text((left - EDGE / 2, middle), row, INK, font, "rm")
        for x, column in enumerate(columns):
            if (row, column) not in values:
                continue
            value, images = values[row, column]
            share = (value - low) / (high - low) if high > low else 0.0
            box = (left + x * cell, top + y * CELL_HEIGHT)
            box += (box[0] + cell - 2, box[1] + CELL_HEIGHT - 2)
            shade = tuple(round(p + (d - p) * share) for p, d in zip(PAPER, DARK, strict=True))
            frame = CHOSEN if (row, column) == chosen else (220, 220, 220)
            draw.rectangle(box, shade, frame, 3 if (row, column) == chosen else 1)
            text = f"{form.format(value)} / {images}"
            ink = PAPER if share > 0.5 else INK
            draw.text((box[0] + cell / 2, middle), text, ink, font, "mm")
    draw.text((EDGE, image.height - EDGE - SIZE / 2), note, INK, font, "lm")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def short(model: str) -> str:
    """A model's name without the folders above it."""
    return Path(model).name or model
