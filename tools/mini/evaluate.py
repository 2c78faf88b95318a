"""The table of the evaluation's sections, and the page rendered from their figures."""

from __future__ import annotations

from pathlib import Path

from revelio.run_dir import write_whole
from tools.mini.distance import mini_dit_distance, mini_sd_distance, mini_sd_photo_distance
from tools.mini.page import render
from tools.mini.report import Inputs, Section, read_report, write_section
from tools.mini.sections import clip_by_name, diffusion_classifier, dit_samples, samples
from tools.mini.sections_features import mini_dit, mini_sd
from tools.mini.sections_photo import mini_sd_photo, mini_sd_photo_curve, vit_photo, vit_random

SECTIONS: dict[str, Section] = {
    "mini-clip": clip_by_name,
    "samples": samples,
    "sample-distance": mini_sd_distance,
    "diffusion-classifier": diffusion_classifier,
    "mini-sd": mini_sd,
    "dit-samples": dit_samples,
    "dit-sample-distance": mini_dit_distance,
    "mini-dit": mini_dit,
    "mini-sd-photo": mini_sd_photo,
    "photo-sample-distance": mini_sd_photo_distance,
    "mini-sd-photo-curve": mini_sd_photo_curve,
    "vit": vit_photo,
    "vit-random": vit_random,
}


def evaluate(inputs: Inputs, only: list[str]) -> Path:
    """Measure the given sections (all that are missing if none), then render the page.

    Raises:
        ValueError: An unknown section.
    """
    report = inputs.docs / "mini_models.json"
    unknown = [name for name in only if name not in SECTIONS]
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    for name in only or [name for name in SECTIONS if name not in read_report(report)]:
        write_section(report, name, SECTIONS[name], inputs)
    page = inputs.docs / "mini_models.md"
    write_whole(page, render(read_report(report)))
    return page
