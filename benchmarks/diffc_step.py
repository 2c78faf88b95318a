"""A training step of Diff-C from stored grids against one that makes its grids on-line, as the paper's does.

    python benchmarks/diffc_step.py --json diffc_step.json
    python benchmarks/diffc_step.py --sd15 64 --width 1024 --steps 3 --json diffc_step_sd15.json

Both train the same head in the same batches by the same loop; on-line every batch goes through picture, crop,
VAE and the U-Net up to the layer, stored grids are read from their store. They take turns; medians a
step, of the processor's time.
`released` is what the code that came with the paper does: the whole U-Net whatever the layer. For SD-1.5 at
512 px, the ratio of multiplications is said beside; `--sd15` times its shapes with random weights.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from extraction import UNET, VAE, FixedText, backbone_of, pictures, random_model

from revelio.activations.extract import extract
from revelio.backbones.diffusion.schedule import reference_schedule
from revelio.backbones.diffusion.vae import LatentSpace
from revelio.backbones.loading import frozen
from revelio.backbones.registry import load_backbone
from revelio.data.dataset import ImageDataset
from revelio.data.open import open_dataset
from revelio.diffc.config import FitConfig, GridsConfig
from revelio.diffc.fit import Task, start_seed
from revelio.diffc.inputs import live_grids, open_stores
from revelio.diffc.model import head_macs
from revelio.diffc.sources import GridSource, TensorGrids
from revelio.diffc.train import StepState

PAPERS_BATCH = 16
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


def ratios(
    images: ImageDataset, backbones: Mapping[str, Any], layer: str, flags: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds a step from stored grids and from each backbone at work, and their ratios."""
    config = GridsConfig(layer=layer)
    with tempfile.TemporaryDirectory() as folder:
        cut = backbones["on-line"]
        [path] = extract(images, cut, Path(folder), layers=[layer], timesteps=[25], pool="none",
                         batch_size=flags.batch)  # fmt: skip
        stored, _ = open_stores([path], memory_gb=0.5)
        sources: dict[str, GridSource] = {"stored": stored}
        sources |= {name: live_grids(images, each, config) for name, each in backbones.items()}
        runs = {
            name: steps(source, images.classes, flags.width, flags.batch)
            for name, source in sources.items()
        }
        for run in runs.values():
            list(islice(run, 2))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(max(1, flags.steps // 5)):
            for name, run in runs.items():
                times[name] += seconds(run, min(5, flags.steps))
    found = {name: round(1000 * median(each), 2) for name, each in times.items()}
    fast = {f"times as fast as {n}": round(found[n] / found["stored"], 1) for n in backbones}
    print(layer, found, fast, flush=True)
    return {"milliseconds a step": found} | fast


def at_papers_batch(found: dict[str, Any], flags: argparse.Namespace) -> dict[str, Any]:
    """The ratio at the paper's batch: a measured step of the head, and as many images' passes as measured."""
    side = flags.sd15 // 16
    labels = [number % 2 for number in range(2 * PAPERS_BATCH)]
    grids = TensorGrids([torch.randn(len(labels), 1280, side, side)], labels)
    head = 1000 * min(seconds(steps(grids, ("a", "b"), flags.width, PAPERS_BATCH), 2))
    times = found["milliseconds a step"]
    passes = PAPERS_BATCH * (times["on-line"] - times["stored"]) / flags.batch
    return {
        f"milliseconds of a stored step of {PAPERS_BATCH} images": round(head, 2),
        f"times as fast as on-line with {PAPERS_BATCH} images a step": round(
            (passes + head) / head, 1
        ),
    }


def sd15_parts() -> tuple[Any, Any, Any, Any]:
    """U-Net, VAE, text and schedule of SD-1.5 with random weights."""
    unet = random_model(lambda: UNet2DConditionModel(**UNET), torch.float32, torch.device("cpu"))
    vae = random_model(lambda: AutoencoderKL(**VAE), torch.float32, torch.device("cpu"))
    unet, vae = (frozen(one, torch.device("cpu"), convolutional=True) for one in (unet, vae))
    latents, schedule = LatentSpace(vae, "sd-1.5", 64), reference_schedule("scaled_linear")
    return unet, latents, FixedText(torch.float32, torch.device("cpu")), schedule


def main() -> None:
    """Time the steps, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini-sd")
    parser.add_argument("--sd15", type=int, metavar="SIDE", help="SD-1.5 at so many pixels instead")
    parser.add_argument("--source", default="samples")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of each, after two to warm up")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    by_layer = {}
    if flags.sd15:
        noise = pictures(2 * flags.batch)
        labels = [number % 2 for number in range(len(noise))]
        images = replace(noise, labels=labels, classes=("a", "b"))
        by_layer["up_ft1"] = ratios(
            images, {"on-line": backbone_of(*sd15_parts(), ["up_ft1"], flags.sd15)}, "up_ft1", flags
        )
        if flags.batch < PAPERS_BATCH:
            by_layer["up_ft1"] |= at_papers_batch(by_layer["up_ft1"], flags)
    else:
        images = open_dataset(flags.source).spread(flags.images)
        for layer in LAYERS:
            cut, whole = load_backbone(flags.model, layers=[layer]), load_backbone(flags.model)
            by_layer[layer] = ratios(images, {"on-line": cut, "released": whole}, layer, flags)
    head = SD15["head"]
    result = {
        "model": f"SD-1.5 of random weights, {flags.sd15} px" if flags.sd15 else flags.model,
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
