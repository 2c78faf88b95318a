"""The extraction of `reproduce table2a` (four layers, one timestep) against four separate ones; its plan.

    python benchmarks/reproduce.py --images 400 --json reproduce.json
    python benchmarks/reproduce.py --sd15 64 --images 16 --json reproduce_sd15.json

`shared` is what `reproduce` does: an image is encoded once, and one pass gives all layers. `separate` is our
own extraction of a layer at a time, cut after the layer. `as released` is a plain loop a layer: encode, the
whole U-Net, a hook (the paper's code, one layer a process; the loading of the model is not counted for it).
All on the same pictures, batch and model; the least of the rounds counts, in seconds of the processor. Then
the whole table is run, and its seconds stand beside those that its plan said beforehand. `--sd15` extracts
with SD-1.5's shapes and random weights instead, where the VAE is more of the work; no table is run.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffc_step import sd15_parts
from extraction import backbone_of

from revelio.activations.extract import extract
from revelio.backbones.hooks import capture, hooked
from revelio.backbones.registry import load_backbone
from revelio.data.config import DataConfig
from revelio.data.dataset import ImageDataset
from revelio.data.loading import batches
from revelio.data.open import open_dataset
from revelio.pipelines.reproduce import ReproduceConfig, reproduce
from revelio.pipelines.reproduce_plan import plan_item

LAYERS = ("bottleneck", "up_ft0", "up_ft1", "up_ft2")
TIMESTEP, BATCH = 25, 32


def shared(model: Any, images: ImageDataset, out: Path) -> None:
    """One extraction of all layers."""
    extract(
        images,
        model,
        out,
        layers=LAYERS,
        timesteps=[TIMESTEP],
        batch_size=BATCH,
        vae_cache=out / "vae",
    )


def separate(models: dict[str, Any], images: ImageDataset, out: Path) -> None:
    """An extraction for each layer, of a model that is cut after it."""
    for layer, model in models.items():
        extract(images, model, out / layer, layers=[layer], timesteps=[TIMESTEP], batch_size=BATCH)


@torch.no_grad()
def as_released(whole: Any, images: ImageDataset, out: Path) -> None:
    """A loop for each layer through VAE and whole U-Net."""
    told = whole.conditioning([""])
    for layer in LAYERS:
        rows = []
        for batch in batches(images, whole.transform, BATCH):
            x0 = whole.encode(batch.pixels).float()
            x_t = whole.schedule.add_noise(x0, torch.randn_like(x0), TIMESTEP)
            found: dict[str, Any] = {}
            with hooked(whole, {layer: capture(found, layer)}):
                whole.predict(x_t, TIMESTEP, told[torch.zeros(len(x0), dtype=torch.long)])
            rows.append(found[layer].mean((2, 3)))
        torch.save(torch.cat(rows), out / f"{layer}.pt")


def timed(work: Callable[[Path], None], rounds: int) -> float:
    """The least seconds of some rounds, each into a folder of its own."""
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            work(Path(folder))
            found.append(time.process_time() - begun)
    return min(found)


def models(side: int | None, name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Cut after the deepest layer, whole, and cut after each."""
    if side is None:
        cut = {layer: load_backbone(name, layers=[layer]) for layer in LAYERS}
        return load_backbone(name, layers=LAYERS), load_backbone(name), cut
    parts = sd15_parts()
    made = {layer: backbone_of(*parts, [layer], side) for layer in LAYERS}
    return backbone_of(*parts, LAYERS, side), backbone_of(*parts, None, side), made


def whole_table(flags: argparse.Namespace) -> dict[str, Any]:
    """The seconds of the table, and those that its plan said."""
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(source=flags.source, limit=flags.images)
        config = ReproduceConfig(
            out=Path(folder) / "out", data=data, scale="mini", seeds=1, teraflops=flags.teraflops
        )
        plan = plan_item("table2a", config)
        begun = time.process_time()
        reproduce("table2a", config)
        table = time.process_time() - begun
    return {
        "seconds, one training a layer": round(table, 1),
        "seconds that the plan said": round(plan.tera / plan.teraflops, 1),
        "at TFLOP/s": flags.teraflops,
    }


def main() -> None:
    """Time the three, run the table, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini-sd")
    parser.add_argument("--sd15", type=int, metavar="SIDE", help="SD-1.5 at so many pixels instead")
    parser.add_argument("--source", default="samples")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--teraflops", type=float, default=0.03, help="what the device sustains")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    images = open_dataset(flags.source).spread(flags.images)
    one, whole, cut = models(flags.sd15, flags.model)
    seconds = {
        "shared": timed(lambda out: shared(one, images, out), flags.rounds),
        "separate": timed(lambda out: separate(cut, images, out), flags.rounds),
        "as released": timed(lambda out: as_released(whole, images, out), flags.rounds),
    }
    found = {
        "model": f"SD-1.5 of random weights, {flags.sd15} px" if flags.sd15 else flags.model,
        "images": flags.images,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "times as fast as separate": round(seconds["separate"] / seconds["shared"], 2),
        "times as fast as released": round(seconds["as released"] / seconds["shared"], 2),
    }
    if not flags.sd15:
        found["the whole table"] = whole_table(flags)
    print(json.dumps(found, indent=2))
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
