"""Every setting of the advisor, declared once; the command inherits it. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from revelio.backbones.config import BackboneConfig
from revelio.bounds import Count, Index, NotEmpty, OpenShare, OutFolder, PathFields, Range, Seed
from revelio.data.config import DataConfig

Probe = Literal["linear", "knn"]
# Parts of the images that the linear probe is tested on in turn; so many images every class must have.
FOLDS = 5
# Of each class in the first round; its probe is tested on as many parts.
FIRST_OF_CLASS = 3


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(PathFields):
    """What is compared on which images, and how much is spent on it."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images. With class folders (or other labels) the advice is by accuracy; without, by label-free
    measures, which say far less."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""

    others: tuple[str, ...] = ()
    """Further models to compare: names that `revelio backbones` lists, folders or hub ids, in the same number
    format and on the same device."""

    layers: tuple[str, ...] = ()
    """Layers, as `revelio backbones` lists them; none: all that give grids."""

    timesteps: tuple[Index, ...] = (25, 100, 200, 400)
    """Training timesteps of models with noise; others have none."""

    prompts: Annotated[tuple[str, ...], NotEmpty()] = ("empty",)
    """Prompt policies: `empty`, `generic`, `from_clip`, `fixed:TEXT`, `captions:FILE`."""

    judge_by: Probe = "linear"
    """What decides: the accuracy of a linear probe, or of nearest neighbors. Both are reported."""

    most_images: Annotated[int, Range(20)] = 400
    """Images in all, of every class alike; the last contenders see them all."""

    first_images: Count = 32
    """Images of the cheap pass over everything; at least three of each class."""

    growth: Annotated[int, Range(2)] = 4
    """The factor by which the images grow, and the remaining model passes shrink, from round to round."""

    confidence: OpenShare = 0.95
    """The confidence level of the intervals, and of leaving out candidates that are surely worse."""

    batch_size: Count = 16
    """Images per batch."""

    seed: Seed = 0
    """Seed of the choice of images, the parts they are tested in, and the noise."""

    out: OutFolder = Path("runs/advice")
    """The run directory to create."""

    resume: bool = False
    """Go on with a run that was stopped: what was extracted is not extracted again."""
