"""Every setting of Diff-C and of its training and test, declared once; command lines inherit it.

Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from revelio.backbones.config import BackboneConfig
from revelio.bounds import (
    Count,
    Device,
    Folder,
    Index,
    LearningRate,
    NotNegative,
    OpenShare,
    OutFolder,
    PathFields,
    Range,
    Seed,
    Share,
    Workers,
    check_fields,
    shared,
)
from revelio.data.config import DataConfig

Mode = Literal["fixed", "as_paper", "as_code"]
NumberFormat = Literal["float32", "bfloat16", "float16"]
ON_LINE, FIXED_VIEWS = -1, 4
VALIDATION = 0.1
END_RATES = {"fixed": 5e-5, "as_paper": 5e-5, "as_code": 0.0}
AS_CODE_PERIOD = 90


@dataclass(frozen=True, kw_only=True)
class DiffCConfig:
    """What the classifier is (Sec. 3.3, Table 1); the defaults are the paper's."""

    width: Count = 1024
    """Channels of the four convolutions; 64 to 128 is quick and enough for small backbones."""

    dropout: Share = 0.0
    """Share of channels (after convolutions) and of entries (before the last layer) dropped."""

    def sizes(self, channels: int, classes: int) -> dict[str, Any]:
        """The arguments of the classifier (`DiffC`) for grids of so many channels."""
        return {"channels": channels, "classes": classes} | shared(self, DiffCConfig)


@dataclass(frozen=True, kw_only=True)
class FitConfig(DiffCConfig):
    """How it is trained and how often (Sec. 4.1); the defaults are the paper's.

    Raises:
        ValueError: a value is outside its bounds.
    """

    mode: Mode = "fixed"
    """Where paper and released code differ: `fixed` is the paper's schedule with a validation set, which
    picks the epoch if it has 1,000 images; `as_paper` takes the last epoch; `as_code` too, and anneals
    towards 0 over 90 epochs but stops at 30."""

    epochs: Count = 30
    """How often each training image is seen."""

    batch_size: Annotated[int, Range(2)] = 16
    """Images a training step; batch norm needs at least two."""

    learning_rate: LearningRate = 1e-4
    """AdamW's at the start; a cosine takes it to 5e-5 (`as_code`: towards 0), or to half of it where that is
    less."""

    weight_decay: NotNegative = 0.01
    """AdamW's weight decay."""

    validation: Share | None = None
    """Share of every class held out to watch the training and, from 1,000 images on, to pick the epoch;
    none: the mode's (0.1 in fixed, else 0)."""

    seed: Seed = 0
    """Seed of weights, order and validation set of the first training."""

    seeds: Count = 1
    """How many trainings: weights, order and validation set from seed, seed + 1, ..."""

    device: Device = "auto"
    """Where the classifier is trained: `auto`, `cpu`, `cuda`, ..."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def held_out(self) -> float:
        """The share of train that validation gets."""
        if self.validation is not None:
            return self.validation
        return VALIDATION if self.mode == "fixed" else 0.0

    @property
    def end_rate(self) -> float:
        """What the cosine goes to."""
        return min(END_RATES[self.mode], self.learning_rate / 2)

    @property
    def period(self) -> int:
        """The epochs that it takes for that."""
        return AS_CODE_PERIOD if self.mode == "as_code" else self.epochs

    def rate(self, epoch: int) -> float:
        """The learning rate of epoch 0, 1, ..."""
        part = (1 + math.cos(math.pi * epoch / self.period)) / 2
        return self.end_rate + (self.learning_rate - self.end_rate) * part

    def seed_list(self) -> list[int]:
        """The seed of each training."""
        return list(range(self.seed, self.seed + self.seeds))

    def plain(self) -> dict[str, Any]:
        """The settings as they took effect, for reports."""
        own = shared(self, FitConfig)
        del own["device"]
        return own | {"validation": self.held_out, "end_rate": self.end_rate, "period": self.period}


@dataclass(frozen=True, kw_only=True)
class GridsConfig:
    """How grids are made: by which model, at which layer, from which noise and text."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model that makes the grids; `pixels` is the picture itself."""

    random_weights: Seed | None = None
    """Give the backbone random weights from this seed: the baseline that shows what training gave."""

    layer: str = "up_ft1"
    """The layer whose grids are classified."""

    timestep: Index | None = 25
    """The noise level, an index of the backbone's own schedule; none: a backbone without noise."""

    prompts: str = "empty"
    """`empty`, `generic`, `from_clip`, `fixed:TEXT` or `captions:FILE`."""

    clip: str = "clip-vit-b-32"
    """The zero-shot model of `from_clip`: a known name, a folder or a hub id."""

    seed: Seed = 0
    """Seed of crops and noise."""

    def made(self) -> dict[str, Any]:
        """The same as plain values, which are saved with the classifier; the device is left out."""
        backbone = asdict(self.backbone)
        del backbone["device"]
        own = {name: getattr(self, name) for name in _OWN}
        return {"backbone": backbone.pop("name")} | backbone | own

    @classmethod
    def of(cls, made: Mapping[str, Any], device: str = "auto") -> Self:
        """What :meth:`made` gave, with a device; other entries are left out."""
        known = {one.name for one in fields(BackboneConfig)} - {"name", "device"}
        backbone = {name: made[name] for name in known if made.get(name) is not None}
        own: dict[str, Any] = {name: made[name] for name in _OWN if made.get(name) is not None}
        own["timestep"] = made.get("timestep")
        model = BackboneConfig(name=made["backbone"], device=device, **backbone)
        return cls(backbone=model, **own)


_OWN = [one.name for one in fields(GridsConfig) if one.name != "backbone"]


@dataclass(frozen=True, kw_only=True)
class TestConfig:
    """The images that the classifier is tested on; all else is as in `data`."""

    __test__ = False  # no test class, whatever pytest thinks of its name

    split: str | None = "test"
    """The split; none, and where the images have no splits at all: a share of every class is cut off the
    training images instead."""

    fraction: OpenShare = 0.2
    """The share that is cut off."""

    limit: Count | None = None
    """Take only this many, spread evenly."""

    per_class: Count | None = None
    """Take only the first so many of each class."""


@dataclass(frozen=True, kw_only=True)
class TrainDiffCConfig(FitConfig, GridsConfig, PathFields):
    """Diff-C trained on one layer's grids, and tested, in a run folder."""

    out: OutFolder = Path("runs/diffc")
    """The run directory to create."""

    data: DataConfig = field(default_factory=DataConfig)
    """The training images."""

    test: TestConfig = field(default_factory=TestConfig)
    """The test images."""

    seed: Seed = 0
    """Seed of crops and noise, and of the first training."""

    views: Annotated[int, Range(ON_LINE)] | None = None
    """How many augmented views of each image are computed once and kept; 0: only the plain view;
    -1: on-line, a fresh one every epoch. None: the mode's (fixed: 4; as_paper, as_code: on-line)."""

    renamed: ClassVar[dict[str, str]] = {"stores": "store"}

    store: tuple[Folder, ...] = ()
    """Stored grids to train on instead of images: activation stores written with pool `none`,
    several draws of one layer. They say what `data`, `backbone`, `layer` and `timestep` would."""

    test_store: Folder | None = None
    """Stored grids of the test images."""

    pass_size: Count = 8
    """Images per pass of the backbone, where views are computed once."""

    cache_dtype: NumberFormat = "float16"
    """Number format of kept views."""

    cache_gb: NotNegative = 4.0
    """Kept views up to this size stay in memory, larger ones in files."""

    cache_dir: OutFolder | None = None
    """Where those files go and stay; none: into the run directory until it is finished."""

    workers: Workers = 2
    """Threads that read pictures."""

    resume: bool = False
    """Go on with the run in `out`, from its last whole epoch."""

    def __post_init__(self) -> None:
        """Take paths as text; values are checked under their flags' names, or when the pipeline begins."""
        PathFields.__post_init__(self)

    @property
    def kept_views(self) -> int:
        """`views`, or the mode's."""
        if self.views is not None:
            return self.views
        return FIXED_VIEWS if self.mode == "fixed" else ON_LINE


@dataclass(frozen=True, kw_only=True)
class EvalDiffCConfig(PathFields):
    """A trained Diff-C, and what it is tested on."""

    renamed: ClassVar[dict[str, str]] = {"model": "diffc"}

    diffc: str = "runs/diffc/final"
    """The classifier: a run's folder, its `final` folder, or a hub id."""

    data: DataConfig = field(default_factory=lambda: DataConfig(split=TestConfig.split))
    """The images."""

    store: Folder | None = None
    """Stored grids (written with pool `none`) instead of images."""

    out: OutFolder = Path("runs/eval-diffc")
    """The folder to write `report.json`, `predictions.jsonl` and `confusion.png` to."""

    backbone: str | None = None
    """The backbone, where it lies elsewhere than in training; none: the one of training."""

    dtype: NumberFormat | None = None
    """The number format the backbone runs in; none: the one of training."""

    batch_size: Count = 32
    """Images per pass."""

    device: Device = "auto"
    """`auto`, `cpu`, `cuda`, ..."""

    workers: Workers = 2
    """Threads that read pictures."""
