"""Every setting of the demo, declared once. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from revelio.backbones.config import BackboneConfig
from revelio.bounds import Count, Index, OutFolder, PathFields, Range, Seed
from revelio.data.config import DataConfig
from revelio.sae.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class DemoConfig(PathFields):
    """What the demo does with which pictures and model; every value is in its report."""

    first: ClassVar[tuple[str, ...]] = (
        "out",
        "data",
        "backbone",
        "sae",
        "layers",
        "timesteps",
        "train_images",
        "resume",
    )
    renamed: ClassVar[dict[str, str]] = {
        "images": "data.source",
        "dataset": "data.source",
        "root": "data.root",
        "on-error": "data.on-error",
        "mode": "sae.mode",
        "k": "sae.k",
        "expansion": "sae.expansion",
        "steps": "sae.steps",
        "ksae-batch": "sae.batch-size",
        "learning-rate": "sae.learning-rate",
        "top": "m",
    }

    out: OutFolder = Path("runs/demo")
    """The folder to write to."""

    data: DataConfig = field(default_factory=DataConfig)
    """The pictures. A known data set has a train and a test split; of anything else a fifth of every class is
    held out. Class folders give labels; without, the measures that need labels are left out."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""

    layers: tuple[str, ...] = ()
    """The layers; none: all of the model's."""

    timesteps: tuple[Index, ...] = (25, 100, 200, 400)
    """The timesteps of the purity table; left out for a model without noise."""

    diffc_timestep: Index = 25
    """The timestep that Diff-C takes its grids at."""

    train_images: Count = 2000
    """At most so many pictures for k-SAEs, purity and Diff-C's training."""

    test_images: Count = 500
    """At most so many held-out pictures for Diff-C."""

    sae: RunConfig = field(
        default_factory=lambda: RunConfig(
            k=4,
            expansion=2,
            steps=1000,
            batch_size=512,
            learning_rate=2e-3,
            warmup_steps=100,
            checkpoint_every=0,
        )
    )
    """The k-SAEs of pooled activations, one a layer and timestep: far smaller than the paper's, as
    docs/evidence.md found for so few dimensions and pictures, with a higher learning rate for so few
    updates."""

    cell_sae: RunConfig = field(
        default_factory=lambda: RunConfig(
            k=2,
            expansion=2,
            steps=4000,
            batch_size=2048,
            learning_rate=8e-3,
            warmup_steps=100,
            decay=0.8,
            checkpoint_every=1000,
        )
    )
    """The k-SAE that the gallery shows: of the cells of the layer and timestep whose pooled latents are
    surely purest. docs/evidence.md: of cells this recipe beats every control in error and stability."""

    m: Annotated[int, Range(2)] = 10
    """Top images that a latent is judged by."""

    width: Count = 64
    """Width of Diff-C's convolutions (paper: 1024)."""

    epochs: Count = 8
    """Epochs of Diff-C."""

    diffc_seeds: Count = 3
    """Trainings of each Diff-C. With one, a better layer can't be distinguished from a luckier training, and
    no winner is named."""

    batch_size: Count = 50
    """Images per pass of the model."""

    seed: Seed = 0
    """Seed of the held-out part, noise, resampling and Diff-C; the k-SAEs have their own (`sae.seed`)."""

    resume: bool = False
    """Go on with an interrupted demo; one that is done is only shown."""
