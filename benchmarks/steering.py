"""What steering costs: time and peak memory of a picture, plain against steered, in turns.

    python benchmarks/steering.py --json steering.json
    python benchmarks/steering.py --steps 25 --pictures 8 --rounds 9

The text route adds a concept to one layer of the text encoder. The denoiser route ablates eight latents of a
k-SAE in one layer at each step: every cell is encoded, or their mean, in the conditional half of the guided
batch as by default, or in both. The k-SAE is trained for a moment on the layer's cells, and the latents are
drawn among those that fire. Rounds are interleaved and begin with another method each; medians of the
processor's time and of each round's ratio to plain are printed.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.backbones.hooks import hooked
from revelio.backbones.registry import load_backbone
from revelio.run_dir import versions
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import batches_of
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.train import SAERun, begin, train_many
from revelio.steering.concept import from_texts
from revelio.steering.edits import Edit, LatentChange
from revelio.steering.steer import edited, steered

TEXT_LAYER, DENOISER_LAYER = "text_encoder.block1", "up_ft1"
LATENTS, TRAINING_STEPS = 8, 300


def methods(layers: PipelineLayers, flags: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """By name what makes the context to draw in."""
    concept = from_texts(layers, TEXT_LAYER, None, ["a dress"], ["a bag"])
    ksae, latents = trained(layers, flags)

    def ablated(read: Any, branch: Any) -> AbstractContextManager[None]:
        change = LatentChange(ksae, dict.fromkeys(latents, 0.0), "ablate", read)
        return edited(layers, [Edit(DENOISER_LAYER, change, ksae.d, branch=branch)])

    return {
        "plain": nullcontext,
        "text": lambda: steered(layers, concept, -0.5),
        "denoiser, cells": lambda: ablated("cells", "conditional"),
        "denoiser, cells, both halves": lambda: ablated("cells", "both"),
        "denoiser, pooled": lambda: ablated("pooled", "conditional"),
    }


def trained(
    layers: PipelineLayers, flags: argparse.Namespace
) -> tuple[KSparseAutoencoder, list[int]]:
    """A k-SAE of the cells of the layer while it draws, and some of its latents.

    Untrained where memory is measured: training would take more of it than any drawing.
    """
    if flags.only:
        width = layers.layers[DENOISER_LAYER].channels
        ksae = KSparseAutoencoder(width, flags.expansion * width, flags.k).eval()
        ksae.kernel = fastest_kernel(ksae)
        return ksae, list(range(LATENTS))
    seen: list[torch.Tensor] = []

    def note(output: torch.Tensor) -> None:
        seen.append(output.flatten(2).transpose(1, 2).flatten(0, 1).float())

    with hooked(layers, {DENOISER_LAYER: note}, exact=False):
        drawing(layers, flags)
    rows = torch.cat(seen)
    ksae = KSparseAutoencoder(rows.shape[1], flags.expansion * rows.shape[1], flags.k)
    config = TrainConfig(steps=TRAINING_STEPS, batch_size=1024, warmup_steps=20)
    batches = batches_of(rows, config)
    kernel = fastest_kernel(ksae)
    for _ in train_many([SAERun(ksae, config, begin(ksae, batches, config), kernel)], batches):
        pass
    ksae.eval().kernel = kernel
    codes = ksae.encode(rows)
    firing = codes.indices[codes.values > 0].unique()
    picked = torch.randperm(len(firing), generator=torch.Generator().manual_seed(0))[:LATENTS]
    return ksae, firing[picked].tolist()


def drawing(layers: PipelineLayers, flags: argparse.Namespace) -> None:
    """Draw once."""
    noise = [torch.Generator().manual_seed(seed) for seed in range(flags.pictures)]
    layers.pipeline(
        ["a photo of a dress"] * flags.pictures,
        num_inference_steps=flags.steps,
        guidance_scale=3.0,
        generator=noise,
        output_type="pt",
    )


def timed(layers: PipelineLayers, flags: argparse.Namespace) -> dict[str, list[float]]:
    """Processor seconds a picture, by method, a number a round."""
    chosen = methods(layers, flags)
    found: dict[str, list[float]] = {name: [] for name in chosen}
    names = list(chosen)
    for number in range(flags.rounds):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            began = time.process_time()
            with chosen[name]():
                drawing(layers, flags)
            found[name].append((time.process_time() - began) / flags.pictures)
    return found


def peak_mib(flags: argparse.Namespace, name: str) -> float:
    """Peak memory of a process of its own that draws once by one method."""
    words = [sys.executable, __file__, "--only", name, "--steps", flags.steps]
    words += ["--pictures", flags.pictures, "--expansion", flags.expansion, "--k", flags.k]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="mini-sd")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = load_backbone(flags.model).pipeline()  # type: ignore[attr-defined]
    pipeline.set_progress_bar_config(disable=True)
    layers = PipelineLayers(pipeline, flags.model)
    if flags.only:
        with methods(layers, flags)[flags.only]():
            drawing(layers, flags)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    report = summary(timed(layers, flags), flags)
    print(json.dumps(report, indent=1))
    if flags.json:
        flags.json.write_text(json.dumps(report, indent=1) + "\n")


def summary(found: dict[str, list[float]], flags: argparse.Namespace) -> dict[str, Any]:
    """Medians, and those of each round's ratio to plain with their quartiles."""
    entries: dict[str, Any] = {}
    plain = peak_mib(flags, "plain")
    for name, seconds in found.items():
        ratios = sorted(one / base for one, base in zip(seconds, found["plain"], strict=True))
        memory = peak_mib(flags, name)
        entries[name] = {
            "seconds_a_picture": median(seconds),
            "ratio": median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "peak_mib": memory,
            "peak_ratio": memory / plain,
        }
    asked = {"model": flags.model, "steps": flags.steps, "pictures": flags.pictures}
    asked |= {"rounds": flags.rounds, "expansion": flags.expansion, "k": flags.k}
    capability = torch.backends.cpu.get_cpu_capability()
    return {"asked": asked, "instructions": capability, "methods": entries, "made_with": versions()}


if __name__ == "__main__":
    main()
