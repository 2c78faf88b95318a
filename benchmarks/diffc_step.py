"""A training step of Diff-C from stored grids against one that makes its grids on-line, as the paper's does.

    python benchmarks/diffc_step.py --json diffc_step.json
    python benchmarks/diffc_step.py --model mini-sd-photo --source my/photos

Both train the same head in the same batches by the same loop; on-line every batch goes through picture, crop,
VAE and the U-Net up to the layer, stored grids are read from their store. They take turns; medians a
step, of the processor's time.
`released` is what the code that came with the paper does: the whole U-Net whatever the layer. For SD-1.5 at
512 px, whose passes no CPU makes in reasonable time, the ratio of multiplications is said beside.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median

from revelio.activations.extract import extract
from revelio.backbones.registry import load_backbone
from revelio.data.open import open_dataset
from revelio.diffc.config import FitConfig, GridsConfig
from revelio.diffc.fit import Task, start_seed
from revelio.diffc.inputs import live_grids, open_stores
from revelio.diffc.model import head_macs
from revelio.diffc.sources import GridSource
from revelio.diffc.train import StepState

LAYERS = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
# SPEC section 6, GMAC of an image at 512 px: VAE, the U-Net up to up_ft1, all of it; the head's forward pass
# is a third of its step.
SD15 = {"vae": 558, "up_ft1": 219, "whole": 402, "head": 3 * head_macs((1280, 32, 32), 1024) / 1e9}


def steps(
    source: GridSource, classes: tuple[str, ...], width: int, batch: int
) -> Iterator[StepState]:
    """Endless steps of a training."""
    config = FitConfig(width=width, batch_size=batch, epochs=1000, validation=0.0, device="cpu")
    task = Task(source, source, classes)
    yield from start_seed(task, config, 0).steps(source)


def seconds(run: Iterator[StepState], count: int) -> list[float]:
    """Of each of the next steps."""
    found = []
    for _ in range(count):
        begun = time.process_time()
        next(run)
        found.append(time.process_time() - begun)
    return found


def main() -> None:
    """Time the steps, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini-sd")
    parser.add_argument("--source", default="samples")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of each, after two to warm up")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    images = open_dataset(flags.source).spread(flags.images)
    by_layer = {}
    for layer in LAYERS:
        cut, whole = load_backbone(flags.model, layers=[layer]), load_backbone(flags.model)
        config = GridsConfig(layer=layer)
        with tempfile.TemporaryDirectory() as folder:
            [path] = extract(images, cut, Path(folder), layers=[layer], timesteps=[25], pool="none")
            stored, _ = open_stores([path], memory_gb=0.5)
            runs = {
                name: steps(source, images.classes, flags.width, flags.batch)
                for name, source in (
                    ("stored", stored),
                    ("on-line", live_grids(images, cut, config)),
                    ("released", live_grids(images, whole, config)),
                )
            }
            for run in runs.values():
                list(islice(run, 2))
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(flags.steps // 5):
                for name, run in runs.items():
                    times[name] += seconds(run, 5)
            found = {name: round(1000 * median(each), 2) for name, each in times.items()}
        by_layer[layer] = {
            "milliseconds a step": found,
            "times as fast as on-line": round(found["on-line"] / found["stored"], 1),
            "times as fast as released": round(found["released"] / found["stored"], 1),
        }
        print(layer, by_layer[layer], flush=True)
    head = SD15["head"]
    result = {
        "model": flags.model,
        "width": flags.width,
        "batch": flags.batch,
        "layers": by_layer,
        "multiplications of SD-1.5 at 512 px, up_ft1, head of width 1024": {
            "times as few as on-line": round((SD15["vae"] + SD15["up_ft1"] + head) / head, 1),
            "times as few as released": round((SD15["vae"] + SD15["whole"] + head) / head, 1),
        },
    }
    print(json.dumps(result, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
