"""The sections of the evaluation that judge mini-clip and what mini-sd generates and classifies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from revelio.stats import proportion
from tools.mini.captions import PROMPT, nouns
from tools.mini.clip import closest_caption
from tools.mini.data import PictureSet, load_caltech101, load_fashion_mnist
from tools.mini.diffusion import noise_schedule
from tools.mini.diffusion_classifier import classify, even_timesteps, staged_errors
from tools.mini.judge import judge, train_judge
from tools.mini.latents import scaled_latents
from tools.mini.report import Figures, Inputs
from tools.mini.shipped import sample, sample_classes, text_model

MakeSamples = Callable[[list[str], list[int]], list[Image.Image]]

HOW = {"guidance": 3.0, "steps": 25}
SAMPLES_A_CLASS, GRID_COLUMNS = 20, 8
JUDGE_EPOCHS = 3
CLASSIFIED, DRAWS, EVERY, KEEP = 200, 100, 4, 3


def right(predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy with its interval."""
    return proportion(int((predicted == labels).sum()), len(labels))


def held_out(inputs: Inputs, count: int) -> PictureSet:
    """The first `count` test pictures of Fashion-MNIST, in the data set's own (shuffled) order."""
    return load_fashion_mnist(inputs.fashion(), "test").subset(torch.arange(count))


def clip_by_name(inputs: Inputs) -> Figures:
    """mini-clip's top-1 by class names it was trained on, on the whole held-out splits."""
    folder = inputs.models / "mini-clip"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    side = int(model.config.vision_config.image_size)  # pyright: ignore
    found: Figures = {"prompt": PROMPT}
    for pictures in (
        load_fashion_mnist(inputs.fashion(), "test"),
        load_caltech101(inputs.caltech(), "test", side),
    ):
        entry = right(closest_caption(model, tokenizer, pictures), pictures.labels)
        chance = round(1 / len(pictures.class_names), 4)
        found[pictures.name] = {**entry, "images": len(pictures), "chance": chance}
    return found


def as_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """PIL pictures of one size -> uint8 `(n, 3, h, w)`."""
    stack = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


def write_grid(pictures: list[Image.Image], columns: int, path: Path, zoom: int = 2) -> None:
    """Put pictures row by row into one PNG."""
    width, height = (length * zoom for length in pictures[0].size)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for i, picture in enumerate(pictures):
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (i % columns * width, i // columns * height))
    sheet.save(path, optimize=True)


def samples(inputs: Inputs) -> Figures:
    """mini-sd's guided samples by prompt."""

    def make(words: list[str], labels: list[int]) -> list[Image.Image]:
        prompts = [PROMPT.format(words[label]) for label in labels]
        return sample(inputs.models / "mini-sd", prompts, **HOW, seed=inputs.seed)

    return judged(inputs, make, "mini_sd_samples.png")


def dit_samples(inputs: Inputs) -> Figures:
    """mini-dit's guided samples by class."""

    def make(words: list[str], labels: list[int]) -> list[Image.Image]:
        return sample_classes(inputs.models / "mini-dit", labels, **HOW, seed=inputs.seed)

    return judged(inputs, make, "mini_dit_samples.png")


def judged(inputs: Inputs, make: MakeSamples, sheet: str) -> Figures:
    """Samples of every class, judged by a classifier trained on real pictures only.

    Args:
        inputs: Where things are.
        make: Class words and the labels wanted -> a picture a label.
        sheet: The PNG of some of them, beside the report.
    """
    train = load_fashion_mnist(inputs.fashion(), "train")
    test = load_fashion_mnist(inputs.fashion(), "test")
    model = train_judge(train, JUDGE_EPOCHS, inputs.seed)
    labels = torch.arange(10).repeat_interleave(SAMPLES_A_CLASS)
    made = make(nouns(train), labels.tolist())
    predicted = judge(model, as_tensor(made))
    shown = [made[c * SAMPLES_A_CLASS + i] for c in range(10) for i in range(GRID_COLUMNS)]
    write_grid(shown, GRID_COLUMNS, inputs.docs / sheet)
    by_class = {
        name: int((predicted[labels == i] == i).sum()) for i, name in enumerate(train.class_names)
    }
    return {
        "accuracy": right(predicted, labels),
        "judge_on_held_out": right(judge(model, test.images), test.labels),
        "right_by_class": by_class,
        "samples": len(labels),
        **HOW,
        "sheet": sheet,
        "chance": 0.1,
        "bar": 0.8,
    }


def diffusion_classifier(inputs: Inputs) -> Figures:
    """Zero-shot Diffusion Classifier accuracy of mini-sd, and by how many draws it gets there."""
    pictures = held_out(inputs, CLASSIFIED)
    prompts = [PROMPT.format(word) for word in nouns(pictures)]
    denoiser, vae = text_model(inputs.models / "mini-sd", prompts)
    latents = scaled_latents(vae, pictures.images, 32)
    cache = inputs.runs / "diffusion_classifier"
    errors = resumable_errors(denoiser, latents, cache, inputs.seed)
    early = torch.arange(EVERY // 2, DRAWS, EVERY)
    curve = {
        str(len(early)): right(classify(errors[:, early]), pictures.labels),
        str(DRAWS): right(classify(errors), pictures.labels),
    }
    return {
        "accuracy": curve[str(DRAWS)],
        "by_draws": curve,
        "images": CLASSIFIED,
        "draws": DRAWS,
        "timesteps": "evenly over 0..999",
        "stages": f"{len(early)} draws for all classes, the other {DRAWS - len(early)} for the best "
        f"{KEEP} (computed in resumable blocks: the seconds are the last call's only)",
        "chance": 0.1,
        "bar": 0.85,
    }


def resumable_errors(denoiser: Any, latents: torch.Tensor, cache: Path, seed: int) -> torch.Tensor:
    """Errors `(n, draws, classes)` ten images at a time, each ten kept in a file of `cache`."""
    from tools.mini.loop import save_whole

    schedule, times = noise_schedule(), even_timesteps(DRAWS)
    parts = []
    for start in range(0, len(latents), 10):
        file = cache / f"errors_{start:04d}.pt"
        if not file.is_file():
            generator = torch.Generator().manual_seed(1_000_000 * seed + start)
            found = staged_errors(
                denoiser,
                latents[start : start + 10],
                schedule,
                times,
                generator,
                every=EVERY,
                keep=KEEP,
            )
            save_whole(found, file)
        parts.append(torch.load(file, weights_only=True))
    return torch.cat(parts)
