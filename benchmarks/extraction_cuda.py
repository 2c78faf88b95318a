"""Extraction of SD-1.5's up_ft1 on one CUDA device against a plain diffusers loop, pictures to stored rows.

    python benchmarks/extraction_cuda.py --json extraction_cuda.json
    python benchmarks/extraction_cuda.py --images 256 --batch 16 --dtype float16
    python benchmarks/extraction_cuda.py --compile

Both read the same photographs' worth of noise through the same number of worker processes, in the same
number format, with the same random weights. The loop is what anyone would write: VAE, noise, whole
U-Net, a hook, the mean moved to the CPU; it takes the layout that is faster for it (channels last). Ours
is `revelio.extract` as a command runs it, shards written; `--compile` adds it with what `revelio extract
--compile` compiles, in the turn that warms up, whose seconds are told. The runs take turns; images a second
of wall time are printed, and the share of that time in which the device computes, by the profiler.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from extraction import FOUR, UNET, VAE, FixedText, backbone_of, pictures, random_model
from torch import Tensor

from revelio.activations.extract import extract
from revelio.backbones.compiled import compile_backbone
from revelio.backbones.diffusion.schedule import reference_schedule
from revelio.backbones.diffusion.vae import LatentSpace
from revelio.backbones.loading import frozen
from revelio.data.dataset import ImageDataset
from revelio.data.loading import batches

Call = Callable[[], Any]


class PlainLoop:
    """VAE, noise, whole U-Net, a hook on the decoder block; a data loader with workers."""

    def __init__(self, unet: Any, vae: Any, text: FixedText, transform: Any) -> None:
        self.unet, self.vae = (m.to(memory_format=torch.channels_last) for m in (unet, vae))
        self.text, self.transform = text, transform
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.scheduler = DDPMScheduler(**betas)  # type: ignore[arg-type]

    @torch.no_grad()
    def run(self, dataset: ImageDataset, timestep: int, batch: int, workers: int) -> Tensor:
        """The pooled up_ft1 of every image."""
        kept: list[Tensor] = []
        handle = self.unet.up_blocks[1].register_forward_hook(
            lambda *call: kept.append(call[2].float().mean(dim=(2, 3)).cpu())
        )
        for read in batches(dataset, self.transform, batch, workers=workers):
            pixels = read.pixels.to("cuda", self.unet.dtype)
            latents = self.vae.encode(pixels).latent_dist.mode() * self.vae.config["scaling_factor"]
            steps = torch.full((len(latents),), timestep, device="cuda")
            noised = self.scheduler.add_noise(latents, torch.randn_like(latents), steps)  # type: ignore[arg-type]
            self.unet(noised, steps, encoder_hidden_states=self.text.embed([""] * len(latents)))
        handle.remove()
        return torch.cat(kept)


def timed(calls: dict[str, Call], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median wall seconds of each call, which take turns; and of the first turn, which warms up."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            wall[name].append(round(time.perf_counter() - began, 3))
    seconds = {name: round(median(taken[1:]), 3) for name, taken in wall.items()}
    return seconds, {name: taken[0] for name, taken in wall.items()}


def busy(call: Call) -> float:
    """The share of a call's wall time in which the device computes or copies."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    events = [e for e in profile.events() or [] if str(e.device_type).endswith("CUDA")]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    total, end = 0.0, 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return round(total / 1e6 / wall, 3)


def fused(unet: Any, vae: Any, text: FixedText, schedule: Any, side: int) -> Any:
    """A backbone of its own whose parts are compiled."""
    found = backbone_of(unet, LatentSpace(vae, "sd-1.5", 64), text, schedule, ["up_ft1"], side)
    compile_backbone(found)
    return found


def fitting(free_gib: float, side: int) -> int:
    """The batch to take with so much free memory: 32, or less by halves.

    On an H100 batches of 32 at 512 px took 13.6 GiB, of which the weights of both variants are 4.
    """
    batch = 32
    while batch > 1 and 4.0 + 0.3 * batch * (side / 512) ** 2 > free_gib:
        batch //= 2
    return batch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch", type=int, help="default: 32, less where memory is short")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="also with compiled parts")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        raise SystemExit(
            "extraction_cuda.py: no CUDA device is visible; extraction.py is for a CPU"
        )
    dtype, device = getattr(torch, options.dtype), torch.device("cuda")
    options.batch = options.batch or fitting(torch.cuda.mem_get_info()[0] / 2**30, options.side)
    unet = random_model(lambda: UNet2DConditionModel(**UNET), dtype, device)
    vae = random_model(lambda: AutoencoderKL(**VAE), dtype, device)
    text, dataset = FixedText(dtype, device), pictures(options.images)
    own_unet, own_vae = (frozen(deepcopy(m), device, convolutional=True) for m in (unet, vae))
    latents, schedule = LatentSpace(own_vae, "sd-1.5", 64), reference_schedule("scaled_linear")
    shallow = backbone_of(own_unet, latents, text, schedule, ["up_ft1"], options.side)
    deep = backbone_of(own_unet, latents, text, schedule, FOUR, options.side)
    loop = PlainLoop(unet, vae, text, shallow.transform)
    with tempfile.TemporaryDirectory() as folder:
        work, number = Path(folder), iter(range(10**6))

        def ours(backbone: Any, layers: Any, *timesteps: int, cached: bool = False) -> Call:
            return lambda: extract(
                dataset, backbone, work / str(next(number)), layers=layers, timesteps=timesteps,
                batch_size=options.batch, workers=options.workers,
                vae_cache=work / "z0" if cached else None,
            )  # fmt: skip

        def plain() -> Tensor:
            return loop.run(dataset, 25, options.batch, options.workers)

        ours(shallow, ["up_ft1"], 25, cached=True)()
        calls: dict[str, Call] = {
            "plain loop": plain,
            "one timestep from scratch": ours(shallow, ["up_ft1"], 25),
            "two timesteps together": ours(shallow, ["up_ft1"], 25, 200),
            "a further timestep, from cached latents": ours(shallow, ["up_ft1"], 200, cached=True),
            "four layers, from cached latents": ours(deep, FOUR, 25, cached=True),
        }
        if options.compile:
            parts = [frozen(deepcopy(m), device, convolutional=True) for m in (unet, vae)]
            compiled = fused(parts[0], parts[1], text, schedule, options.side)
            calls["one timestep from scratch, compiled"] = ours(compiled, ["up_ft1"], 25)
        found = told(options, *timed(calls, options.rounds))
        # Before the profiler's turn, which a time limit may cut off.
        write(found, options.json)
        shares = {name: busy(call) for name, call in calls.items()}
    found["share_of_time_the_device_computes"] = shares
    print(json.dumps(found, indent=2))
    write(found, options.json)


def told(
    options: argparse.Namespace, seconds: dict[str, float], first: dict[str, float]
) -> dict[str, Any]:
    """What was measured, and what it comes to."""
    per = {name: round(options.images / taken, 1) for name, taken in seconds.items()}
    base = seconds["plain loop"]
    return {"settings": {k: v for k, v in vars(options).items() if k != "json"}} | {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seconds": seconds,
        "seconds_of_the_first_turn": first,
        "images_per_second": per,
        "times_faster_than_the_loop": {name: round(base / s, 2) for name, s in seconds.items()},
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def write(found: dict[str, Any], path: Path | None) -> None:
    """As JSON, where a file is named."""
    if path:
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
