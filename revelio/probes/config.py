"""Every setting of probes and zero-shot classifiers, declared once. Imports no torch: commands take them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from revelio.backbones.config import BackboneConfig
from revelio.bounds import Count, Device, Folder, NotEmpty, OutFile, OutFolder, PathFields, Seed
from revelio.data.config import DataConfig
from revelio.wording import plural

ProbeName = Literal["linear", "knn", "attention", "resnet"]


@dataclass(frozen=True, kw_only=True)
class DiffusionClassifierConfig:
    """How the Diffusion Classifier spends its passes.

    Raises:
        ValueError: settings that fit no plan.
    """

    samples: tuple[int, ...] = (16, 64)
    """Noise samples of an image by the end of each stage, each at a timestep of its own, evenly spread."""

    keep: tuple[int, ...] = (5,)
    """Classes that go on after each stage but the last."""

    loss: Literal["l1", "l2", "huber"] = "l2"
    """How the prediction is compared with what was asked for."""

    timesteps: tuple[int, int] | None = None
    """First timestep and the one behind the last; None is the whole schedule."""

    confidence: float | None = None
    """Stop an image after a stage when its best class is better than every other by a paired t-test of this
    confidence over all classes and stages together, such as 0.99; None goes through all stages."""

    batch_size: int = 32
    """Passes of the network at once, of whatever images, samples and classes."""

    images_at_once: int = 16
    """Images whose passes share batches; they are reported together."""

    seed: Seed = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        """Check the plan."""
        if not self.samples or any(
            b <= a for a, b in zip((0, *self.samples), self.samples, strict=False)
        ):
            raise ValueError(f"samples must grow from stage to stage, not {self.samples}")
        if len(self.keep) != len(self.samples) - 1:
            raise ValueError(
                f"samples has {plural(len(self.samples), 'stage')} and keep "
                f"{plural(len(self.keep), 'number')}: give a number of classes for each stage but the last"
            )
        if (
            any(b > a for a, b in zip(self.keep, self.keep[1:], strict=False))
            or min(self.keep, default=1) < 1
        ):
            raise ValueError(f"keep must be at least 1 and never grow, not {self.keep}")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}: it must be between 0 and 1")
        if min(self.batch_size, self.images_at_once) < 1:
            raise ValueError("batch_size and images_at_once must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(PathFields):
    """Which probes are trained on which stores, and where the table goes."""

    store: Annotated[tuple[Folder, ...], NotEmpty()]
    """Activation stores of the training images, one for each layer (or timestep, or model) to compare."""

    test_store: Annotated[tuple[Folder, ...], NotEmpty()]
    """Activation stores of the test images, in the same order; all of the same images."""

    probes: Annotated[tuple[ProbeName, ...], NotEmpty()] = ("linear", "knn")
    """`linear`: logistic regression; `knn`: nearest neighbors by cosine; both see the mean of a grid.
    `attention`: a learned query that pools the grid; `resnet`: a residual network; both need whole grids
    (pool `none`)."""

    seeds: Count = 1
    """How many times each probe is trained, from seed, seed + 1, ...: another validation part, and first
    weights. With one alone the intervals hold the test images' part only, and nothing is compared."""

    seed: Seed = 0
    """Seed of the validation part and of first weights."""

    epochs: Count = 30
    """Passes over the training images, of the attention and ResNet probes."""

    batch_size: Count = 32
    """Images a step, of the attention and ResNet probes."""

    device: Device = "auto"
    """Where the attention and ResNet probes run: `auto` (CUDA where there is one), `cpu`, `cuda`, `mps`."""

    out: OutFile = Path("runs/probes.json")
    """The JSON file to write."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(PathFields):
    """Which images are classified by the names of their classes, and by what."""

    method: Literal["diffusion", "clip"] = "diffusion"
    """`diffusion`: the Diffusion Classifier with the model `backbone`; `clip`: the CLIP of `clip`."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images; their class names make the prompts."""

    templates: tuple[str, ...] = ()
    """Prompts with `{}` for the class name; CLIP takes the mean over several, the Diffusion Classifier one.
    None: the data set's own."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The diffusion model."""

    classifier: DiffusionClassifierConfig = field(default_factory=DiffusionClassifierConfig)
    """How the Diffusion Classifier spends its passes."""

    clip: str = "clip-vit-b-32"
    """A CLIP: a known name, a folder or a hub id."""

    device: Device = "auto"
    """Where CLIP runs: `auto` (CUDA where there is one), `cpu`, `cuda`, `mps`."""

    out: OutFolder = Path("runs/zero-shot")
    """The run directory to create; `metrics.jsonl` in it gets one line an image."""

    resume: bool = False
    """Go on with a run that was stopped: images that have a line are not classified again."""
