"""What a mini model's YAML may say: one frozen dataclass a kind of model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    The learning rate is warmed up over `warmup_steps`, held, and falls linearly to zero over the
    last `decay` share of the time: progress is seconds trained over `minutes`, so that the end is
    annealed whatever the machine's load.

    `batch` is shared out among `processes`, each with `threads`; small models use two cores better that way.
    `precision` is that of the products; weights, moments and moving average stay in float32.
    `graph` records a U-Net's step as CUDA graphs, on a GPU only.
    """

    minutes: float
    batch: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay: float = 0.4
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    threads: int = 1
    processes: int = 1
    checkpoint_minutes: float = 4.0
    snapshot_minutes: float = 0.0
    log_steps: int = 100
    precision: Literal["float32", "bfloat16"] = "float32"
    graph: bool = False

    @property
    def share(self) -> int:
        """Pictures of a batch that each process draws."""
        return self.batch // self.processes


@dataclass(frozen=True)
class Sources:
    """Which data sets are trained on; their folders come from the command line.

    `cifar10_limit` takes only that many of CIFAR-10's first pictures; 0 takes all.
    """

    fashion_mnist: bool = False
    caltech101: bool = False
    cifar10: bool = False
    cifar10_limit: int = 0


@dataclass(frozen=True)
class Views:
    """Random squares of the training pictures, mirrored half the time, for trainings of many epochs.

    Latents are encoded once, so a diffusion model sees `count` fixed views of a picture, the first
    of which is the picture itself; mini-clip draws a new view at every step and has no use for it.

    Attributes:
        count: Views of a picture.
        smallest: The smallest view's share of the picture's side.
        side: Photographs are read at this many pixels, so that a view is not blurred; 0 is the model's.
    """

    count: int = 1
    smallest: float = 1.0
    side: int = 0


@dataclass(frozen=True)
class VaeConfig:
    """A small `AutoencoderKL`; the latents keep 16x16x4."""

    name: str
    schedule: Schedule
    sources: Sources
    side: int = 32
    channels: tuple[int, ...] = (32, 64)
    blocks: int = 1
    groups: int = 8
    kl_weight: float = 1e-4


@dataclass(frozen=True)
class ClipConfig:
    """A small `CLIPModel` and its tokenizer.

    With `text_from`, a folder of a `CLIPModel`, its tokenizer and text encoder are taken as they are
    and the image encoder alone is trained, against every noun at every step.
    """

    name: str
    schedule: Schedule
    sources: Sources
    side: int = 64
    patch: int = 8
    vision_width: int = 128
    vision_layers: int = 6
    text_width: int = 128
    text_layers: int = 4
    heads: int = 4
    projection: int = 128
    max_length: int = 32
    vocabulary: int = 1500
    text_minutes: float = 5.0
    text_from: str = ""
    views: Views = Views()


@dataclass(frozen=True)
class UnetShape:
    """Width and depth of a `UNet2DConditionModel` with the block types of SD-1.5."""

    channels: tuple[int, ...] = (32, 64, 128, 128)
    blocks: int = 1
    heads: tuple[int, ...] = (2, 2, 4, 4)
    groups: int = 8


@dataclass(frozen=True)
class DitShape:
    """Width and depth of a `DiTTransformer2DModel`."""

    heads: int = 4
    head_width: int = 48
    blocks: int = 10
    patch: int = 2


@dataclass(frozen=True)
class DiffusionConfig:
    """A latent diffusion model on the latents of a mini-vae.

    `unet` makes it text-conditional through mini-clip's text encoder, `dit` class-conditional.
    """

    name: str
    schedule: Schedule
    sources: Sources
    vae: str
    side: int = 32
    clip: str = ""
    unet: UnetShape | None = None
    dit: DitShape | None = None
    empty_share: float = 0.15
    min_snr: float = 5.0
    views: Views = Views()
