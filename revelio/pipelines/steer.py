"""Prompts drawn at several strengths: pictures, a contact sheet with strengths as columns, a report."""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from revelio.outputs import check_replaceable, replace_files
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.steer_parts import build_edits, open_pipeline, the_prompts
from revelio.run_dir import versions, write_json
from revelio.steering.config import SteerConfig
from revelio.steering.draw import batched, draw
from revelio.steering.prompts import Prompt
from revelio.steering.steer import edited
from revelio.trust import printable

MAKER = "steer"
SHEET, REPORT = "sheet.png", "report.json"
# The sheet shows the first so many rows; all pictures are in files of their own.
SHEET_ROWS = 40


@dataclass(frozen=True)
class Steered:
    """What was drawn.

    Attributes:
        path: the folder.
        report: what `report.json` holds.
    """

    path: Path
    report: dict[str, Any]


def steer(config: SteerConfig, progress: Report = silent) -> Steered:
    """Draw every prompt at every strength with the same noise.

    Args:
        config: what, how, and where to.
        progress: told after each batch.

    Raises:
        KeyError: an unknown model or layer.
        ValueError: something does not fit together, or a file is in the way; nothing is written.
    """
    prompts = the_prompts(config)
    check_replaceable(config.out, MAKER, (SHEET, REPORT))
    layers = open_pipeline(config.backbone)
    edits = build_edits(layers, config)
    with edited(layers, edits):
        pass  # what can't be is refused before anything is drawn
    made: dict[str, Image.Image] = {}
    seconds: dict[str, float] = {}
    total = len(config.strength) * len(prompts) * config.images_per_prompt
    for strength in config.strength:
        with ExitStack() as stack:
            stack.enter_context(edited(layers, [replace(one, strength=strength) for one in edits]))
            began = time.monotonic()
            for image in range(config.images_per_prompt):
                for batch in batched(prompts, config):
                    pictures = draw(layers, batch, image, config)
                    for one, picture in zip(batch, pictures, strict=True):
                        made[picture_name(one, image, strength)] = picture
                    progress(Progress("", len(made), total, "picture"))
            count = len(prompts) * config.images_per_prompt
            seconds[f"{strength:g}"] = (time.monotonic() - began) / count
    report = {
        "model": layers.name,
        "config": plain_values(asdict(config)),
        "prompts": [asdict(one) for one in prompts],
        "seconds_a_picture": seconds,
        "made_with": versions(),
    }
    sheet = contact_sheet(made, prompts, config)

    def write(folder: Path) -> None:
        (folder / "pictures").mkdir()
        for name, picture in made.items():
            picture.save(folder / "pictures" / name)
        sheet.save(folder / SHEET)
        write_json(folder / REPORT, report)

    replace_files(config.out, MAKER, write)
    return Steered(config.out, report)


def picture_name(prompt: Prompt, image: int, strength: float) -> str:
    """The file of a picture: prompt, number, strength."""
    return f"{prompt.id}-{image}-{strength:+g}.png"


def contact_sheet(
    made: dict[str, Image.Image], prompts: list[Prompt], config: SteerConfig, margin: int = 18
) -> Image.Image:
    """A row a picture of a prompt, a column a strength."""
    rows = [(one, image) for one in prompts for image in range(config.images_per_prompt)][
        :SHEET_ROWS
    ]
    first = next(iter(made.values()))
    zoom = max(1, 96 // first.width)
    width, height = first.width * zoom, first.height * zoom
    sheet = Image.new(
        "RGB", (len(config.strength) * width, margin + len(rows) * (height + margin)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for column, strength in enumerate(config.strength):
        pen.text((column * width + 4, 3), f"{strength:+g}" if strength else "0", fill="black")
        for row, (one, image) in enumerate(rows):
            top = margin + row * (height + margin)
            picture = made[picture_name(one, image, strength)]
            sheet.paste(
                picture.resize((width, height), Image.Resampling.NEAREST), (column * width, top)
            )
            if column == 0:
                pen.text((4, top + height + 3), printable(one.text[:200]), fill="black")
    return sheet


def plain_values(value: Any) -> Any:
    """Paths as texts, for JSON."""
    if isinstance(value, dict):
        return {name: plain_values(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [plain_values(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
