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
CIFAR = "CIFAR-10, 40,000 of its training pictures (Krizhevsky, 2009; its page names no licence)"
ABOUT = {
    "mini-clip": (
        "A small CLIP: image and text encoder, trained on captions made of class names.",
        "It knows the names of some 120 things and short sentences around them, nothing else. It was "
        "trained on the names of the very classes that it is measured on: what it does there is "
        "classify a closed set, not zero-shot. Other classes were not tried.",
    ),
    "mini-sd": (
        "A small Stable Diffusion: text-conditional latent diffusion on pictures of clothes.",
        "It draws ten kinds of grey clothes at 32x32 and understands no other prompt.",
    ),
    "mini-sd-photo": (
        "A small Stable Diffusion for photographs at 64x64.",
        "Its pictures are small and blurred. Of 32 prompts (guidance 3, 30 steps) about ten gave "
        "something to be made out, such as a face, a bird, a truck or a soccer ball; the others "
        "gave shapes and textures without a thing in them. It is here for its features.",
    ),
    "mini-dit": (
        "A small DiT: class-conditional diffusion transformer on mini-sd's latents.",
        "Classes 0 to 9 are Fashion-MNIST's; 1000 is the null class; the rows between are "
        "untrained, and are there because `DiTPipeline` writes its null class as 1000.",
    ),
}
# What the line about the training's length leaves out.
TRAINED = {
    "mini-clip": "That is the image encoder, from random weights. The text encoder was trained before, "
    "for 4 minutes on two processor cores (`configs/mini/mini-clip.yaml`), and is left as it was: "
    "mini-sd and mini-sd-photo are conditioned by it.",
    "mini-sd-photo": "That is the U-Net, from random weights. Its VAE, trained on two processor cores "
    "(`configs/mini/mini-vae-photo.yaml`: the same photographs and the first 8,000 of CIFAR-10), and "
    "mini-clip's text encoder were left as they were.",
}
SECTIONS = {
    "mini-clip": ("mini-clip",),
    "mini-sd": ("samples", "sample-distance", "diffusion-classifier", "mini-sd"),
    "mini-sd-photo": ("photo-sample-distance", "mini-sd-photo-curve", "mini-sd-photo"),
    "mini-dit": ("dit-samples", "dit-sample-distance", "mini-dit"),
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
    if name in TRAINED:
        lines += ["", TRAINED[name]]
    lines += ["", "```yaml", config.read_text().strip(), "```", "", "## Measured", ""]
    for section in SECTIONS[name]:
        if section in report:
            title, part = PARTS[section]
            # The sheet of samples stays with the report.
            text = re.sub(r"!\[[^]]*\]\([^)]*\)\n\n", "", part(report[section]))
            lines += [f"### {title}", "", text]
    lines += ["How it was measured: `docs/mini_models.md`.", "", "## Limits", "", limits, ""]
    return "\n".join(lines)
