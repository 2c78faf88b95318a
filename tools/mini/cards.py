"""Model cards of the shipped mini models: facts from their configs and logs, figures from the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tools.mini.page import PARTS
from tools.mini.report import Figures

FASHION = "Fashion-MNIST, training split (60,000 pictures; Zalando, MIT licence)"
CALTECH = "Caltech-101, a training split of 6,060 photographs (licence CC BY 4.0; its clutter class left out)"
CIFAR = "CIFAR-10, training pictures (Krizhevsky, 2009; its page names no licence)"
ABOUT = {
    "mini-clip": (
        "A small CLIP: image and text encoder, trained on captions made of class names.",
        "It knows the names of some 120 things and short sentences around them, nothing else.",
    ),
    "mini-sd": (
        "A small Stable Diffusion: text-conditional latent diffusion on pictures of clothes.",
        "It draws ten kinds of grey clothes at 32x32 and understands no other prompt.",
    ),
    "mini-sd-photo": (
        "A small Stable Diffusion for photographs at 64x64.",
        "Two processor cores gave it a small part of the training that photographs need: its "
        "pictures are no good. It is here for its features and for how they came about.",
    ),
    "mini-dit": (
        "A small DiT: class-conditional diffusion transformer on mini-sd's latents.",
        "Classes 0 to 9 are Fashion-MNIST's; 1000 is the null class; the rows between are "
        "untrained, and are there because `DiTPipeline` writes its null class as 1000.",
    ),
}
SECTIONS = {
    "mini-clip": ("mini-clip",),
    "mini-sd": ("samples", "diffusion-classifier", "mini-sd"),
    "mini-sd-photo": ("mini-sd-photo-curve", "mini-sd-photo"),
    "mini-dit": ("dit-samples", "mini-dit"),
}


def sources(values: dict[str, Any]) -> list[str]:
    """The data sets of a config."""
    chosen: dict[str, Any] = values["sources"]
    limit = chosen.get("cifar10_limit", 0)
    cifar = f"{CIFAR}, the first {limit:,}" if limit else CIFAR
    named = {"fashion_mnist": FASHION, "caltech101": CALTECH, "cifar10": cifar}
    return [text for key, text in named.items() if chosen.get(key)]


def last_step(run: Path) -> tuple[dict[str, float], str]:
    """The last logged step of a training run, {} without a log, and what it ran on."""
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    steps = [line for line in lines if "rate" in line]
    devices = [f"one {line['device']}" for line in lines if "device" in line]
    return steps[-1] if steps else {}, (devices or ["two shared processor cores"])[-1]


def card(name: str, config: Path, run: Path, report: dict[str, Figures]) -> str:
    """The README.md of a shipped folder.

    Args:
        name: The model.
        config: Its YAML under `tools/configs/`.
        run: Its training run, for how far it went.
        report: The sections of `docs/mini_models.json`.
    """
    values = yaml.safe_load(config.read_text())
    about, limits = ABOUT[name]
    lines = ["---", "license: apache-2.0", "library_name: diffusers", "---", "", f"# {name}", ""]
    lines += [about, "", "## Data", ""] + [f"- {text}" for text in sources(values)]
    lines += ["", "No held-out picture was trained on.", "", "## Training", ""]
    step, device = last_step(run)
    if step:
        minutes = step["seconds"] / 60
        lines.append(
            f"{step['images']:,} pictures in {step['step']:,} steps and "
            f"{minutes:.{0 if minutes >= 10 else 1}f} minutes on {device}."
        )
    lines += ["", "```yaml", config.read_text().strip(), "```", "", "## Measured", ""]
    for section in SECTIONS[name]:
        if section in report:
            title, part = PARTS[section]
            # The sheet of samples stays with the report.
            text = re.sub(r"!\[[^]]*\]\([^)]*\)\n\n", "", part(report[section]))
            lines += [f"### {title}", "", text]
    lines += ["How it was measured: `docs/mini_models.md`.", "", "## Limits", "", limits, ""]
    return "\n".join(lines)
