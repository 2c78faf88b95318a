"""How good a classifier is: top-1, accuracy by class, confusion (counts, picture), and two intervals.

``wilson95`` says how far the top-1 of one trained model could be off because the test set is finite
(Wilson's score interval of a binomial share). ``t95`` says how far the mean over several seeds could be
off because training is random (Student's t over seeds). Neither contains the other;
:func:`revelio.stats.trainings95` holds both.
"""

import io
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from jaxtyping import Int64
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from revelio.stats import t95, wilson95

PAPER, INK, GRID = (255, 255, 255), (30, 30, 40), (225, 228, 235)
DARK = (20, 52, 110)  # a row's share of 1
SIDE, LARGEST_CELL, FONT, NAMED = 760, 48, 12, 60


def confusion(
    labels: Int64[Tensor, " n"], predicted: Int64[Tensor, " n"], classes: int
) -> Int64[Tensor, "classes classes"]:
    """How many images of class (row) were taken for class (column)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def measure(
    labels: Int64[Tensor, " n"], predicted: Int64[Tensor, " n"], names: Sequence[str]
) -> dict[str, Any]:
    """Top-1 with its interval and the accuracy of every class; shares are from 0 to 1.

    Returns:
        ``top1``, ``wilson95``, ``correct``, ``images``, ``class_mean`` (the mean of the classes' own
        accuracies), ``per_class``, a list of ``{name, images, accuracy}`` of the classes that occur, and
        ``wrong``, the numbers of the images that were not taken for what they are.
    """
    counts = confusion(labels, predicted, len(names))
    correct, images = int(counts.trace()), int(counts.sum())
    rows = zip(names, counts.sum(dim=1).tolist(), counts.diagonal().tolist(), strict=True)
    per_class = [
        {"name": n, "images": all_, "accuracy": hit / all_} for n, all_, hit in rows if all_
    ]
    return {
        "top1": correct / images,
        "wilson95": wilson95(correct, images),
        "correct": correct,
        "images": images,
        "class_mean": mean(row["accuracy"] for row in per_class),
        "per_class": per_class,
        "wrong": (labels != predicted).nonzero().flatten().tolist(),
    }


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of top-1 over seeds with its interval."""
    return {"mean": mean(values), "t95": t95(values), "seeds": len(values), "values": list(values)}


CAPTION = "rows: true class; columns: taken for; shade: share of the row"


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
    caption = ImageFont.load_default(size=FONT)
    # Of few classes the matrix is narrower than its caption.
    width = max(margin + side, 12 + int(caption.getlength(CAPTION))) + 12
    image = Image.new("RGB", (width, margin + side + 34), PAPER)
    draw = ImageDraw.Draw(image)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    for row in range(classes):
        for column in range(classes):
            corner = (margin + column * cell, margin + row * cell)
            _cell(draw, corner, cell, float(shares[row, column]), int(counts[row, column]), font)
    if named:
        _names(image, names, cell, margin, font)
    left = min(margin, width - 12 - int(caption.getlength(CAPTION)))
    draw.text((left, margin + side + 10), CAPTION, fill=INK, font=caption)
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
