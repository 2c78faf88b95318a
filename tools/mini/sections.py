"""The sections of the evaluation that judge mini-clip and what mini-sd generates and classifies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from revelio.backbones.base import DiffusionModel
from revelio.backbones.registry import load_backbone
from revelio.data.dataset import ImageDataset
from revelio.probes.config import DiffusionClassifierConfig
from revelio.probes.diffusion_classifier import diffusion_classifier as classify_images
from revelio.stats import proportion
from revelio.trust import read_json_lines
from tools.mini.captions import PROMPT, nouns
from tools.mini.clip import closest_caption
from tools.mini.data import PictureSet, load_caltech101, load_fashion_mnist
from tools.mini.features import as_picture, ids_of
from tools.mini.judge import judge, train_judge
from tools.mini.report import Figures, Inputs
from tools.mini.shipped import sample, sample_classes

MakeSamples = Callable[[list[str], list[int]], list[Image.Image]]

HOW = {"guidance": 3.0, "steps": 25}
SAMPLES_A_CLASS, GRID_COLUMNS = 20, 8
JUDGE_EPOCHS = 3
CLASSIFIED = 200
CLASSIFY = DiffusionClassifierConfig(samples=(25, 100), keep=(3,), batch_size=40, images_at_once=10)


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
    """Diffusion Classifier accuracy of mini-sd on its own classes, by how many samples it takes."""
    pictures = held_out(inputs, CLASSIFIED)
    config = replace(CLASSIFY, seed=inputs.seed)
    rows = resumable_rows(inputs, pictures, config)
    labels = pictures.labels
    curve = {
        str(samples): right(torch.tensor([row["by_stage"][stage] for row in rows]), labels)
        for stage, samples in enumerate(config.samples)
    }
    first, all_samples = config.samples
    return {
        "accuracy": curve[str(all_samples)],
        "by_draws": curve,
        "images": CLASSIFIED,
        "draws": all_samples,
        "timesteps": "evenly over 0..999",
        "stages": f"{first} draws for all classes, the other {all_samples - first} for the best "
        f"{config.keep[0]} (computed in resumable blocks: the seconds are the last call's only)",
        "seconds_an_image": round(sum(row["seconds"] for row in rows) / len(rows), 3),
        "chance": 0.1,
        "bar": 0.85,
    }


def resumable_rows(
    inputs: Inputs, pictures: PictureSet, config: DiffusionClassifierConfig
) -> list[dict[str, Any]]:
    """A row a picture, in order; each is kept in a file of JSON lines as soon as it is there."""
    model = load_backbone(str(inputs.models / "mini-sd"))
    assert isinstance(model, DiffusionModel)
    file = (
        inputs.runs
        / "diffusion_classifier"
        / f"rows_{config.seed}_{config.samples[-1]}_{config.keep[0]}.jsonl"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = read_json_lines(file, torn=True) if file.is_file() else []
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = ImageDataset(
        pictures.name,
        "test",
        pictures.class_names,
        ids_of(pictures, torch.arange(len(pictures)), "test"),
        pictures.labels.tolist(),
        lambda index: as_picture(pictures.images[index]),
    )
    prompts = [PROMPT.format(word) for word in nouns(pictures)]
    done = {row["id"] for row in rows}
    with file.open("a") as out:
        for row in classify_images(model, images, prompts, config, done=done):
            rows.append(asdict(row))
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
    place = {name: position for position, name in enumerate(images.ids)}
    return sorted(rows, key=lambda row: place[row["id"]])
