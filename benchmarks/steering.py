"""What steering costs: time and peak memory of a picture, plain against steered, in turns.

    python benchmarks/steering.py --json steering.json
    python benchmarks/steering.py --steps 25 --pictures 8 --rounds 9

The text route adds a concept to one layer of the text encoder. The denoiser route ablates eight latents of a
k-SAE in one layer at each step, in both halves of the guided batch (the default edits one, half as many
rows): every cell is encoded, or their mean. Rounds are interleaved and begin
with another method each; medians of the processor's time and of each round's ratio to plain are printed.
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
from revelio.backbones.registry import load_backbone
from revelio.run_dir import versions
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import from_texts
from revelio.steering.edits import Edit, LatentChange
from revelio.steering.steer import edited, steered

TEXT_LAYER, DENOISER_LAYER = "text_encoder.block1", "up_ft1"
LATENTS = dict.fromkeys(range(8), 0.0)


def methods(layers: PipelineLayers, expansion: int, k: int) -> dict[str, Callable[[], Any]]:
    """By name what makes the context to draw in."""
    concept = from_texts(layers, TEXT_LAYER, None, ["a dress"], ["a bag"])
    width = layers.layers[DENOISER_LAYER].channels
    ksae = KSparseAutoencoder(width, expansion * width, k).eval()
    ksae.kernel = fastest_kernel(ksae)

    def ablated(read: Any) -> AbstractContextManager[None]:
        change = LatentChange(ksae, LATENTS, "ablate", read)
        return edited(layers, [Edit(DENOISER_LAYER, change, width, branch="both")])

    return {
        "plain": nullcontext,
        "text": lambda: steered(layers, concept, -0.5),
        "denoiser, cells": lambda: ablated("cells"),
        "denoiser, pooled": lambda: ablated("pooled"),
    }


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
    chosen = methods(layers, flags.expansion, flags.k)
    found: dict[str, list[float]] = {name: [] for name in chosen}
    drawing(layers, flags)
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
        with methods(layers, flags.expansion, flags.k)[flags.only]():
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
