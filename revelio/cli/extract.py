"""Images -> activation stores: several layers, timesteps, prompts and draws in one run.

Each image is encoded once; each (timestep, prompt, draw) is one pass of the model, which yields all
layers and is cut after the deepest. The cost is measured on the first images and printed before anything
is written. A store is a folder `<out>/<layer>-t<timestep>-<prompt policy>-d<draw>` of safetensors.

    revelio extract --out runs/samples --layers bottleneck up_ft1 --timesteps 25 200
    revelio extract --config configs/extract/sd15-pets.yaml --plan
    revelio extract --config configs/extract/sd15-pets.yaml --resume
    revelio extract --out runs/cells --layers up_ft1 --cells 64 --store-dtype float16 --plan
    revelio extract --out runs/dino --backbone.name dinov2-vit-b-14 --layers block11 --timesteps
    torchrun --nproc-per-node 4 -m revelio extract --config configs/extract/sd15-pets.yaml
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING, ClassVar

from revelio.activations.config import ExtractRunConfig
from revelio.sae.config import SAEConfig

if TYPE_CHECKING:
    from revelio.activations.store import ActivationStore

# A store of fewer rows than this is trained on in small batches: full ones would be a day's work for a CPU.
SMALL_STORE = 32_768
# Of such a store so many epochs, more where they are fewer steps than the demo's k-SAEs take; its warm-up.
EPOCHS, FEWEST_STEPS, WARMUP = 50, 1000, 100
# The same for cells: the full budget, 84 million rows, would go over fewer than these hundreds of times.
SMALL_CELLS = 262_144


@dataclass(frozen=True, kw_only=True)
class Config(ExtractRunConfig):
    """What to extract, from which images, with which model."""

    renamed: ClassVar[dict[str, str]] = {"latents": "vae-cache", "dtype": "store-dtype"}

    plan: bool = False
    """Only measure and print what it would cost."""


def run(config: Config) -> None:
    """Plan, extract, and name what was written."""
    from revelio.cli.bar import Bar
    from revelio.distributed import is_main
    from revelio.pipelines.extract import extract_to, plan_extraction

    with Bar("extraction") as bar:
        if config.plan:
            plan_extraction(config, bar)
            return
        stores = extract_to(config, bar)
    if is_main():
        print("\n".join(_next(config, stores[0])))


def _next(config: Config, store: "ActivationStore") -> Iterator[str]:
    """A k-SAE of pooled activations or of cells; of grids also Diff-C, which needs labels."""
    from revelio.following import beside, following

    ksae = ["train-ksae", "--store", store.path]
    if config.grid_pool != "mean":
        ksae += ["--rows", "cells"]
        if _cells(store) < SMALL_CELLS:
            ksae += _small(_cells(store), store.row_shape[0], 512)
    elif len(store) < SMALL_STORE:
        ksae += _small(len(store), store.row_shape[0], 256)
    yield following(*ksae, "--out", beside(config.out, "ksae"))
    if config.pool != "mean" and not config.cells and store.labels is not None:
        out = beside(config.out, "diffc")
        yield following("train-diffc", "--store", store.path, "--test-store", "STORE", "--out", out)


def _small(rows: int, d: int, batch_size: int) -> list[object]:
    """The flags of a training on few rows: enough steps for its warm-up, no more latents than rows."""
    trained = rows - rows // 10  # A tenth is held out.
    epochs = max(EPOCHS, ceil(FEWEST_STEPS / ceil(trained / batch_size)))
    words: list[object] = ["--batch-size", batch_size, "--epochs", epochs, "--warmup-steps", WARMUP]
    if trained < SAEConfig.expansion * d:
        words += ["--expansion", max(2, trained // d)]
    return words


def _cells(store: "ActivationStore") -> int:
    """The rows of a k-SAE of the store's cells: stored one by one, or those of its grids."""
    _, *sides = store.row_shape
    return len(store) * prod(sides)
