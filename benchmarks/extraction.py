"""Extraction of SD-1.5's up_ft1 against a plain diffusers loop: VAE, whole U-Net, a hook.

    python benchmarks/extraction.py --json extraction.json
    python benchmarks/extraction.py --side 256 --batch 2 --dtype float32
    python benchmarks/extraction.py --channels-last      # stricter, and half the memory

Both take turns in one process with the same random weights, batch and number format; medians of wall time
and of processor time are printed, and ratios. Each further timestep costs the loop a whole round again.
The loop is as diffusers comes; with --channels-last it gets the memory layout that Revelio uses on a CPU
as a gift, and the two share their weights. SD-1.5 at 512 px takes 10 to 30 s an image on a CPU core: give
it a quarter of an hour. bfloat16 is slow on CPUs that lack it.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from revelio.activations.config import ExtractConfig
from revelio.activations.encode import FreshImages
from revelio.activations.extract import extract
from revelio.activations.extraction_plan import ExtractionPlan
from revelio.backbones.diffusion.schedule import Schedule, reference_schedule
from revelio.backbones.diffusion.sd import StableDiffusionBackbone
from revelio.backbones.diffusion.unet import cut
from revelio.backbones.diffusion.vae import LatentSpace
from revelio.backbones.layers import cut_after, unet_layers
from revelio.backbones.loading import frozen
from revelio.data.dataset import ImageDataset
from revelio.run_dir import versions, write_json

# The configs of stable-diffusion-v1-5's unet and vae; everything else is diffusers' default.
UNET: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
UNET_PARAMETERS = 859_520_964
FOUR = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
# The project's promises: at least so many times faster, or at most so many times the cost.
BARS = {
    "one timestep from scratch": 1.15,
    "two timesteps together": 1.7,
    "every further timestep, from cached latents": 3.0,
    "four layers in one pass / the deepest alone": 1.05,
}


def random_model(make: Callable[[], Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A model with weights of the usual size, made without the time its own initialisation takes."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device=device).to(dtype)
    source = torch.Generator().manual_seed(0)
    block = torch.randn(2**20, generator=source).mul_(0.02).to(device, dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.GroupNorm | nn.LayerNorm) or name == "bias":
                parameter.data.fill_(1.0 if name == "weight" else 0.0)
            else:
                parameter.data.view(-1).copy_(
                    block.repeat(-(-parameter.numel() // len(block)))[: parameter.numel()]
                )
    return model.eval().requires_grad_(False)


class FixedText:
    """Stands for the prompt encoder: neither side encodes the empty prompt more than once."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        source = torch.Generator().manual_seed(1)
        self.empty = torch.randn(1, 77, 768, generator=source).to(device, dtype)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The same embedding for every text."""
        return self.empty.expand(len(texts), -1, -1)

    def tables(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """The one embedding, and that every text has it."""
        return {"states": self.empty}, torch.zeros(len(texts), dtype=torch.long)


class PlainLoop:
    """What anyone would write: transform, VAE, noise, whole U-Net, a hook on the decoder block."""

    def __init__(self, unet: Any, vae: Any, text: FixedText, transform: Any, *, last: bool) -> None:
        layout = torch.channels_last if last else torch.contiguous_format
        self.unet, self.vae = unet.to(memory_format=layout), vae.to(memory_format=layout)
        self.layout, self.text, self.transform = layout, text, transform
        self.scheduler = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )

    @torch.no_grad()
    def run(self, dataset: ImageDataset, timestep: int) -> Tensor:
        """The pooled up_ft1 of every image, one batch."""
        kept: list[Tensor] = []
        handle = self.unet.up_blocks[1].register_forward_hook(lambda *call: kept.append(call[2]))
        pixels = torch.stack([self.transform(dataset.read(i)) for i in range(len(dataset))])
        pixels = pixels.to(self.unet.device, self.unet.dtype).contiguous(memory_format=self.layout)
        latents = self.vae.encode(pixels).latent_dist.mode() * self.vae.config["scaling_factor"]
        steps = torch.full((len(latents),), timestep, device=latents.device)
        noised = self.scheduler.add_noise(latents, torch.randn_like(latents), steps)  # type: ignore[arg-type]
        self.unet(noised, steps, encoder_hidden_states=self.text.embed([""] * len(latents)))
        handle.remove()
        return kept[0].float().mean(dim=(2, 3))


def backbone_of(
    unet: Any,
    latents: LatentSpace,
    text: FixedText,
    schedule: Schedule,
    layers: Sequence[str] | None,
    side: int,
) -> Any:
    """A backbone cut after the deepest of ``layers``, or whole; it shares ``unet``'s weights."""
    kept = cut_after(unet_layers(dict(unet.config), VAE | {"latent_channels": 4}), layers, "sd-1.5")
    part = copy(unet)
    part._modules = dict(unet._modules)
    whole = layers is None
    if not whole:
        cut(part, kept)
    made: Any = StableDiffusionBackbone
    return made(
        part, latents, text, name="sd-1.5", layers=kept, image_size=side, schedule=schedule, whole=whole
    )  # fmt: skip


def pictures(count: int) -> ImageDataset:
    """``count`` photographs' worth of noise."""
    source = torch.Generator().manual_seed(2)
    shape = (count, 360, 480, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source).numpy()
    ids = [f"{i}.png" for i in range(count)]
    return ImageDataset("noise", None, (), ids, None, lambda i: Image.fromarray(images[i]))


def ours(job: ExtractionPlan, *, cached: bool = False) -> Callable[[], Any]:
    """One batch through the extraction's own steps, as ``run`` takes them."""
    span = range(len(job.dataset))

    def batches() -> Any:
        if cached and job.cache is not None:
            return job.cache.shard(0, span, len(span))
        return FreshImages(job.dataset, job.backbone, [span], batch_size=job.batch_size).shard(span)

    def once() -> list[Any]:
        return [job.rows(batch, one) for batch in batches() for one in job.config.passes()]

    return once


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and processor seconds of each call; the calls take turns."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    used: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            before, cpu = time.perf_counter(), time.process_time()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
            print(f"round {index} {name}: {seconds:.2f} s wall, {cpu:.2f} s processor", flush=True)
            if index:  # Round 0 warms up.
                wall[name].append(seconds)
                used[name].append(cpu)
    return {name: {"wall": median(wall[name]), "cpu": median(used[name])} for name in calls}


def ratios(times: dict[str, dict[str, float]], clock: str) -> dict[str, float]:
    """The four numbers that have a bar."""
    of = {name: seconds[clock] for name, seconds in times.items()}
    values = (
        of["plain"] / of["one"],
        2 * of["plain"] / of["two"],
        of["plain"] / of["cached"],
        of["four layers"] / of["deepest alone"],
    )
    return dict(zip(BARS, values, strict=True))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=512, help="pixels; a multiple of 64")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels-last", action="store_true", help="for the loop as well")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    device = torch.device(options.device)
    unet = random_model(lambda: UNet2DConditionModel(**UNET), dtype, device)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert parameters == UNET_PARAMETERS, parameters
    vae = random_model(lambda: AutoencoderKL(**VAE), dtype, device)
    text, dataset = FixedText(dtype, device), pictures(options.batch)
    copied = (lambda model: model) if options.channels_last else deepcopy
    own_unet = frozen(copied(unet), device, convolutional=True)
    own_vae = frozen(copied(vae), device, convolutional=True)
    latents, schedule = LatentSpace(own_vae, "sd-1.5", 64), reference_schedule("scaled_linear")
    shallow = backbone_of(own_unet, latents, text, schedule, ["up_ft1"], options.side)
    deep = backbone_of(own_unet, latents, text, schedule, FOUR, options.side)
    loop = PlainLoop(unet, vae, text, shallow.transform, last=options.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        extract(
            dataset, deep, work / "fill", layers=FOUR, timesteps=(25,),
            batch_size=options.batch, vae_cache=work / "z0",
        )  # fmt: skip

        def job(backbone: Any, layers: tuple[str, ...], *timesteps: int) -> ExtractionPlan:
            config = ExtractConfig(
                layers=layers, timesteps=timesteps, batch_size=options.batch, vae_cache=work / "z0"
            )
            return ExtractionPlan(dataset, backbone, work, config)

        times = timed(
            {
                "plain": lambda: loop.run(dataset, 25),
                "one": ours(job(shallow, ("up_ft1",), 25)),
                "two": ours(job(shallow, ("up_ft1",), 25, 200)),
                "cached": ours(job(shallow, ("up_ft1",), 200), cached=True),
                "four layers": ours(job(deep, FOUR, 25), cached=True),
                "deepest alone": ours(job(deep, FOUR[-1:], 25), cached=True),
            },
            options.rounds,
        )
    report(options, times)


def report(options: argparse.Namespace, times: dict[str, dict[str, float]]) -> None:
    """Print the table; write the JSON where asked for."""
    found = {clock: ratios(times, clock) for clock in ("wall", "cpu")}
    layout = "channels last" if options.channels_last else "diffusers' own layout"
    print(
        f"\nSD-1.5 (random weights), {options.batch} x {options.side} px, {options.dtype}, "
        f"{options.threads} threads of {os.cpu_count()} cores, medians of {options.rounds} rounds; "
        f"the loop in {layout}"
    )
    for name, bar in BARS.items():
        wall, cpu = found["wall"][name], found["cpu"][name]
        good = cpu <= bar if name.startswith("four") else cpu >= bar
        sign = "<=" if name.startswith("four") else ">="
        verdict = "ok" if good else "MISSED"
        print(f"{name:<46} {wall:6.2f}x wall {cpu:6.2f}x cpu   bar {sign} {bar}   {verdict}")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        write_json(
            options.json,
            {
                "settings": settings | {"cores": os.cpu_count(), "unet": UNET_PARAMETERS},
                "versions": versions(),
                "seconds": times,
                "ratios": found,
                "bars": BARS,
            },
        )


if __name__ == "__main__":
    main()
