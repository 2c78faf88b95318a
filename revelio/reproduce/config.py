"""Every setting of a reproduction, declared once. Imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from revelio.bounds import Count, Device, OutFolder, PathFields, Positive, Seed
from revelio.data.config import DataConfig
from revelio.sae.config import Mode

FROM_PAPER = "from-paper"
Scale = Literal["full", "mini"]


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(PathFields):
    """What is run for a table or figure of the paper, on which models and pictures."""

    out: OutFolder = Path("runs/reproduce")
    """The folder to write to. Items share it: a row or extraction of one is not made again for another."""

    renamed: ClassVar[dict[str, str]] = {"model": "backbones"}

    backbones: tuple[str, ...] = ()
    """Backbones to take, as `PAPER=OURS` (`sd-2.1=/models/sd21`); one without `=` stands in for sd-1.5."""

    data: DataConfig = field(default_factory=lambda: DataConfig(source=FROM_PAPER))
    """The pictures; from-paper: each row's own data set. Any other source (and root) stands in for the first
    data set of the item; rows of its others run where `roots` has a copy, and are listed as left out where
    not. Where a split is given, a fifth of it is held out as test images."""

    roots: tuple[str, ...] = ()
    """Local copies of data sets, as `NAME=FOLDER` (`caltech101=/data/caltech101`)."""

    clip: str | None = None
    """The zero-shot model behind the prompt policy from_clip; none: the paper's, in mini scale mini-clip."""

    mode: Mode = "fixed"
    """`as_code` follows the released code, `as_paper` the text, `fixed` what it meant. In `fixed` the rows of
    Diff-C are trained on stored grids without augmentation, so that layers share an extraction."""

    scale: Scale = "full"
    """`full`: the paper's models, pictures and sizes. `mini`: the shipped models on the shipped pictures
    (Pets' rows) and on Caltech-101 (its root must be given), small sizes, minutes on a CPU."""

    seeds: Count = 3
    """Trainings of every row; the intervals and the verdicts are over them."""

    seed: Seed = 0
    """Seed of the first training, of noise and of resampling."""

    device: Device = "auto"
    """Where everything runs: `auto` (CUDA where there is one), `cpu`, `cuda`, ..."""

    scores: tuple[str, ...] = ()
    """What LLaVA-Bench said of the models of table4, as `NAME=FILE`: NAME is clip, clip-dinov2, clip-sd-t25
    or clip-sd-t200, FILE what `revelio llava-bench score --out` wrote, of one training or of several."""

    teraflops: Positive | None = None
    """What the device sustains, for the hours of a plan; none: 20 in full scale, 0.03 (a core) in mini."""
