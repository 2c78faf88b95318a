"""Prompts drawn at several strengths: pictures, a contact sheet with strengths as columns, a report."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from revelio.config import to_plain
from revelio.outputs import check_replaceable, check_same_settings, claimed, replace_files
from revelio.pipelines import Report, Reported, counted, silent
from revelio.pipelines.steer_parts import build_edits, open_pipeline, the_prompts
from revelio.run_dir import versions, write_json
from revelio.steering.config import SteerConfig
from revelio.steering.draw import contact_sheet, draw_into
from revelio.steering.edits import Edit
from revelio.steering.kept import Kept, check_drawn
from revelio.steering.prompts import Prompt
from revelio.steering.steer import edited

MAKER = "steer"
PICTURES, SHEET, REPORT = "pictures", "sheet.png", "report.json"


def steer(config: SteerConfig, progress: Report = silent) -> Reported:
    """Draw every prompt at every strength with the same noise.

    Pictures are kept as they are drawn until all is written: called again after a stop, it goes on with them.

    Args:
        config: what, how, and where to.
        progress: told after each batch.

    Raises:
        KeyError: an unknown model or layer.
        ValueError: something does not fit together, a file is in the way, or the folder holds pictures of
            other settings; nothing is written.
    """
    prompts = the_prompts(config)
    check_replaceable(config.out, MAKER, (SHEET, REPORT))
    check_drawn(config.out)
    with claimed(config.out):
        check_same_settings(config.out / REPORT, config)
        return _steer(config, prompts, progress)


def _steer(config: SteerConfig, prompts: Sequence[Prompt], progress: Report) -> Reported:
    layers = open_pipeline(config.backbone)
    edits = build_edits(layers, config)
    with edited(layers, edits):
        pass  # what can't be is refused before anything is drawn
    told = counted(
        progress, "", len(config.strength) * len(prompts) * config.images_per_prompt, "picture"
    )
    kept = Kept.of(config.out, layers, config.backbone)
    report: dict[str, Any] = {
        "model": layers.name,
        "config": to_plain(config),
        "prompts": [asdict(one) for one in prompts],
        "made_with": versions(),
    }

    def write(folder: Path) -> None:
        pictures = folder / PICTURES
        pictures.mkdir()
        seconds: dict[str, float] = {}
        for strength in config.strength:
            used = at_strength(edits, strength)
            name = f"{strength:+g}"
            with edited(layers, used):
                taken = draw_into(pictures, name, layers, prompts, config, kept.steered(used), told)
            seconds[f"{strength:g}"] = taken
        titles = {f"{s:+g}": f"{s:+g}" if s else "0" for s in config.strength}
        sheet = contact_sheet(pictures, prompts, config.images_per_prompt, titles)
        sheet.save(folder / SHEET)
        report["seconds_a_picture"] = seconds
        write_json(folder / REPORT, report)

    replace_files(config.out, MAKER, write)
    kept.drop()
    return Reported(config.out, report)


def at_strength(edits: Sequence[Edit], strength: float) -> list[Edit]:
    """The edits, each times a strength."""
    return [replace(one, strength=one.strength * strength) for one in edits]
