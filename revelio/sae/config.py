"""Every setting of a k-SAE and of its training, declared once; command lines inherit it. Imports no torch."""

from dataclasses import dataclass, field, replace
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, Self

from revelio.bounds import (
    Count,
    Device,
    Folder,
    Index,
    LearningRate,
    NotEmpty,
    NotNegative,
    OutFolder,
    PathFields,
    Positive,
    Seed,
    Share,
    Workers,
    check_fields,
    shared,
)

Mode = Literal["fixed", "as_paper", "as_code"]
ActivationName = Literal["topk", "batch-topk", "jumprelu"]
PreBias = Literal["mean", "geometric_median"]
Sharing = Literal["data", "latents"]
Rows = Literal["images", "cells"]
Normalize = Literal["none", "mean-norm", "per-dimension"]
KernelName = Literal["auto", "native", "triton", "torch"]


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """What a k-SAE is (Sec. 3.2); the defaults are the paper's.

    Raises:
        ValueError: a value is outside its bounds.
    """

    k: Count = 32
    """Latents that stay active per row, which is an image or a cell (32 in Sec. 4.1)."""

    expansion: Count = 64
    """Latents per dimension of the activations: n = expansion * d (64 in Sec. 4.1)."""

    mode: Mode = "fixed"
    """`as_code` follows the released training step, `as_paper` the text, `fixed` what it meant."""

    activation: ActivationName = "topk"
    """Which latents are active: the k largest of a row; the b k largest of a batch, later all above a
    threshold; all above a threshold that each latent learns, k on average."""

    prefixes: tuple[Count, ...] = ()
    """Matryoshka: numbers of leading latents that are trained to reconstruct alone, too."""

    def __post_init__(self) -> None:
        check_fields(self)

    def sizes(self, d: int) -> dict[str, Any]:
        """The arguments of the k-SAE (`KSparseAutoencoder`) for activations of width d."""
        own = shared(self, SAEConfig)
        return {"d": d, "n": own.pop("expansion") * d} | own


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train (Sec. 4.1); the defaults are the paper's.

    Raises:
        ValueError: a value is outside its bounds, or `epochs` and `samples` are both given.
    """

    steps: Count = 10_240
    """Training steps; the paper's budget is 10,240 steps of full batches."""

    epochs: Positive | None = None
    """Passes over the rows, instead of `steps`."""

    samples: Count | None = None
    """Rows to train on, instead of `steps`."""

    batch_size: Count = 8192
    """Rows per step, over all devices; fewer rows than that are one full batch."""

    learning_rate: LearningRate = 4e-4
    """Adam's learning rate after the warm-up."""

    warmup_steps: Index = 500
    """Steps of linear warm-up; 0: none."""

    decay: Share = 0.0
    """The share of the steps, the last ones, over which the learning rate falls to 0; 0: none."""

    seed: Seed = 0
    """Seed of the first weights and of the rows' order."""

    order_seed: Seed | None = None
    """Seed of the rows' order alone; none: `seed`."""

    pre_bias: PreBias = "mean"
    """What b_pre starts as, taken over the first 32,768 rows. `as_code` always takes the first batch's
    mean."""

    auxk: Index = 0
    """Dead latents per row that learn the residual (Gao et al., 2024); 0: none."""

    auxk_coefficient: NotNegative = 1 / 32
    """The weight of the dead latents' loss, which is normalised as the main loss is, not by the residual's
    variance."""

    dead_after: Count = 100_000
    """A latent counts as dead after so many rows on which it did not fire."""

    bandwidth: Positive = 0.1
    """JumpReLU's kernel width, in standard deviations of the activations."""

    sparsity: NotNegative = 1.0
    """The weight of JumpReLU's penalty (L0 / k - 1)^2."""

    early_stop: Share = 0.0
    """Stop when the mean loss of a window is not lower by this share than the best one before; 0: never."""

    early_stop_window: Count = 500
    """Steps of the window over which `early_stop` averages the loss."""

    memory_gib: NotNegative = 4.0
    """A store up to this size is held in memory and shuffled as a whole; a larger one is streamed, and
    shuffled in windows of 65,536 rows."""

    workers: Workers = 0
    """Threads that read a streamed store ahead; the result is the same."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_budget()

    def check_budget(self) -> None:
        """See that the length of the training is given once.

        Raises:
            ValueError: `epochs` and `samples` are both given.
        """
        if self.epochs is not None and self.samples is not None:
            raise ValueError("give epochs or samples, not both")

    @property
    def rows_seed(self) -> int:
        """The seed of the rows' order."""
        return self.seed if self.order_seed is None else self.order_seed

    def for_rows(self, rows: int) -> Self:
        """The same for a known number of rows: `epochs` or `samples` as `steps`, no larger a batch."""
        if rows < 1:
            return self
        size = min(self.batch_size, rows)
        steps = self.steps
        if self.epochs is not None:
            steps = ceil(self.epochs * ceil(rows / size))
        elif self.samples is not None:
            steps = ceil(self.samples / rows * ceil(rows / size))
        return replace(self, steps=steps, batch_size=size, epochs=None, samples=None)


@dataclass(frozen=True, kw_only=True)
class RunConfig(SAEConfig, TrainConfig):
    """A k-SAE, its training, and how it runs, flat as command lines and YAML files have them."""

    first: ClassVar[tuple[str, ...]] = ("k", "expansion", "steps", "learning_rate", "seed")

    kernel: KernelName = "auto"
    """`native` is compiled once, needs a C++ compiler and AVX2 or 64-bit Arm, and is several times faster;
    `triton` is for CUDA; `auto` takes the device's own where it can be used, else `torch`."""

    sharing: Sharing = "data"
    """What several processes share: every batch, or the latents (for a k-SAE that fits none of them)."""

    held_out: Share | None = None
    """The share of the rows that is held out of training and measured on, too; none: a tenth in mode `fixed`,
    0 in the others and in resumed runs that began without this setting. Fewer than 50 rows are not held
    out."""

    checkpoint_every: Index = 1000
    """Steps between checkpoints; 0: none."""

    log_every: Count = 10
    """Steps between lines of `metrics.jsonl`."""

    def __post_init__(self) -> None:
        """Nothing: command lines check values under their flags' names, and pipelines when they begin."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(PathFields):
    """Values to combine; a setting without values keeps the config's own."""

    store: tuple[Folder, ...] = ()
    """Activation stores: layers, timesteps."""

    k: tuple[Count, ...] = ()
    """Latents that stay active."""

    expansion: tuple[Count, ...] = ()
    """Latents per dimension of the activations."""

    activation: tuple[ActivationName, ...] = ()
    """Which latents are active."""

    learning_rate: tuple[LearningRate, ...] = ()
    """Adam's learning rate."""

    seed: tuple[Seed, ...] = ()
    """Seed of the first weights; the rows keep the order of the config's own `order_seed` or `seed`."""


@dataclass(frozen=True, kw_only=True)
class TrainSAEConfig(RunConfig, PathFields):
    """One k-SAE, or a grid of them, trained on the rows of a store into run folders."""

    store: Annotated[tuple[Folder, ...], NotEmpty()]
    """Activation stores, folders that `revelio extract` wrote: one, or several of the same width, such as
    those of several timesteps, prompts or draws."""

    rows: Rows = "images"
    """What the k-SAE sees: `images`, a grid averaged over its cells; `cells`, each cell by itself, of whole
    grids or of those that were stored. Each image gives as many."""

    normalize: Normalize = "none"
    """What is done to the rows of each store, there and when the k-SAE encodes: `mean-norm` divides them by
    one number, `per-dimension` standardizes each dimension."""

    out: OutFolder
    """The run directory; with a grid, the folder of the run directories."""

    device: Device = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`."""

    grid: SweepConfig = field(default_factory=SweepConfig)
    """Values to combine, each combination a k-SAE."""

    resume: bool = False
    """Go on from the last checkpoint; on a CPU the result is bit-equal to an uninterrupted run."""

    def __post_init__(self) -> None:
        """Take paths as text; values are checked when the pipeline begins."""
        PathFields.__post_init__(self)
