"""The staged, batched Diffusion Classifier against a plain loop over images, classes and samples.

Both classify the same held-out pictures with the same model, timesteps and noise. The loop makes one pass at
a time, with the prompt encoded anew for each, and gives every class every sample (Li et al. 2023, Eq. 6).
Reported are accuracies with their intervals, their paired difference, how often both agree, seconds of the
processor an image, and their ratio.

    python benchmarks/diffusion_classifier.py --model mini-sd --images 40 --json diffusion_classifier.json
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from revelio.backbones.diffusion.schedule import keyed_noise
from revelio.backbones.prompts import class_texts
from revelio.backbones.registry import load_backbone
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.probes.config import DiffusionClassifierConfig
from revelio.probes.diffusion_classifier import diffusion_classifier, even_timesteps
from revelio.probes.score import Score, score
from revelio.stats import paired, rounded


@torch.no_grad()
def plain(model: Any, images: ImageDataset, prompts: list[str], samples: int) -> list[int]:
    """The class of each image, one pass of the network at a time."""
    times = even_timesteps(samples, None, len(model.schedule)).tolist()
    found = []
    for index, name in enumerate(images.ids):
        x0 = model.encode(model.transform(images.read(index))[None]).float()
        errors = []
        for prompt in prompts:
            total = 0.0
            for sample, t in enumerate(times):
                noise = keyed_noise(x0.shape[1:], [name], seed=0, timestep=t, draw=sample)
                x_t = model.schedule.add_noise(x0, noise, t)
                output = model.predict(x_t, t, model.conditioning([prompt]))
                total += float((output - model.schedule.target(x0, noise, t)).pow(2).mean())
            errors.append(total)
        found.append(min(range(len(prompts)), key=errors.__getitem__))
    return found


def entry(found: Score) -> dict[str, float]:
    """Accuracy with its interval, and seconds an image, rounded."""
    return {name: round(value, 4) for name, value in asdict(found).items()}


def main() -> None:
    """Classify both ways and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini-sd")
    parser.add_argument("--source", default="samples", help="a labelled data set or folder")
    parser.add_argument("--template", default="a photo of a {}", help="with {} for the class name")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--samples", type=int, nargs="+", default=[6, 24])
    parser.add_argument("--keep", type=int, nargs="*", default=[3])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    model: Any = load_backbone(flags.model, device=flags.device)
    images = open_dataset(flags.source).spread(flags.images)
    assert images.labels is not None
    prompts = class_texts(images, flags.template)
    config = DiffusionClassifierConfig(samples=tuple(flags.samples), keep=tuple(flags.keep))
    list(diffusion_classifier(model, images.subset([0]), prompts, config))  # warm
    start = process_time()
    fast = [row.predicted for row in diffusion_classifier(model, images, prompts, config)]
    middle = process_time()
    slow = plain(model, images, prompts, config.samples[-1])
    end = process_time()
    staged, loop = (
        score(fast, images.labels, middle - start),
        score(slow, images.labels, end - middle),
    )
    agree = sum(one == other for one, other in zip(fast, slow, strict=True)) / len(images)
    # The staged one's accuracy minus the loop's, on the same pictures.
    gap = paired(*(np.array(each) == np.array(images.labels) for each in (fast, slow)))
    found = {
        "model": flags.model,
        "classes": len(prompts),
        "samples": flags.samples,
        "keep": flags.keep,
        "staged": entry(staged),
        "plain loop": entry(loop),
        "agreement": round(agree, 4),
        "staged minus loop": rounded(gap.value, gap.interval),
        "times as fast": round(loop.seconds / staged.seconds, 2),
    }
    print(json.dumps(found, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
