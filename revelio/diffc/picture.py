"""The confusion matrix as a picture: rows are true classes, columns what they were taken for."""

import io
from collections.abc import Sequence

from jaxtyping import Int64
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, GRID = (255, 255, 255), (30, 30, 40), (225, 228, 235)
DARK = (20, 52, 110)  # a row's share of 1
SIDE, LARGEST_CELL, FONT, NAMED = 760, 48, 12, 60


def confusion_png(counts: Int64[Tensor, "classes classes"], names: Sequence[str]) -> bytes:
    """Draw the matrix with each row as shares of its class; the file's bytes.

    Counts are written into cells that have room, names beside up to 60 classes.
    """
    classes = len(names)
    cell = max(3, min(LARGEST_CELL, SIDE // classes))
    font = ImageFont.load_default(size=min(FONT, max(8, cell - 2)))
    named = classes <= NAMED
    margin = 12 + (int(max(font.getlength(name) for name in names)) if named else 0)
    side = classes * cell
    image = Image.new("RGB", (margin + side + 12, margin + side + 34), PAPER)
    draw = ImageDraw.Draw(image)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    for row in range(classes):
        for column in range(classes):
            corner = (margin + column * cell, margin + row * cell)
            _cell(draw, corner, cell, float(shares[row, column]), int(counts[row, column]), font)
    if named:
        _names(image, names, cell, margin, font)
    note = "rows: true class; columns: taken for; shade: share of the row"
    draw.text((margin, margin + side + 10), note, fill=INK, font=ImageFont.load_default(size=FONT))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _cell(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    cell: int,
    share: float,
    count: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    x, y = corner
    shade = tuple(round(255 + (dark - 255) * share**0.7) for dark in DARK)
    line = GRID if cell > 8 else None
    draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=shade, outline=line)
    text = str(count)
    if count and cell >= 16 and font.getlength(text) < cell - 2:
        ink = PAPER if share > 0.45 else INK
        draw.text((x + cell / 2, y + cell / 2), text, fill=ink, font=font, anchor="mm")


def _names(
    image: Image.Image,
    names: Sequence[str],
    cell: int,
    margin: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """True classes on the left; above, what they were taken for, read upwards."""
    side = len(names) * cell
    rows, columns = (Image.new("RGB", (margin, side), PAPER) for _ in range(2))
    for number, name in enumerate(names):
        y = number * cell + cell / 2
        ImageDraw.Draw(rows).text((margin - 5, y), name, INK, font=font, anchor="rm")
        ImageDraw.Draw(columns).text((5, y), name, INK, font=font, anchor="lm")
    image.paste(rows, (0, margin))
    image.paste(columns.transpose(Image.Transpose.ROTATE_90), (margin, 0))
