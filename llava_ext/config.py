"""What a model is made of, as plain values: its towers, how their tokens are joined, its language model.

The four rows of the paper's Table 4 (SPEC section 3) are four such configs, in ``configs/llava``:
``clip``, ``clip`` + ``dinov2``, ``clip`` + ``sd`` at t = 25, the same at t = 200.
"""

from dataclasses import dataclass
from typing import Literal

from revelio.bounds import AnyText, Count, Dtype, Index, Pixels, Seed

Tokens = Literal["flatten", "pool", "conv"]
Fusion = Literal["interleave", "sequence", "channels"]
Aspect = Literal["crop", "pad"]
Stage = Literal["pretrain", "finetune"]

IMAGE_INDEX = -200  # stands for one image in `input_ids`; LLaVA's own number
IGNORE_INDEX = -100  # a label that is not learnt; PyTorch's own number
IMAGE_TOKEN = "<image>"  # the same in text

TOKEN_STEPS: tuple[Tokens, ...] = ("flatten", "pool", "conv")
FUSIONS: tuple[Fusion, ...] = ("interleave", "sequence", "channels")


@dataclass(frozen=True)
class TowerConfig:
    """A vision tower: a frozen backbone, one of its layers, and how its grid becomes tokens.

    Attributes:
        backbone: a name that ``revelio backbones`` lists, a folder, a hub id, ``module:function``, or a tower
            of your own by the name it was registered under.
        layer: the layer; LLaVA's ``hidden_states[-2]`` of CLIP ViT-L/14 is ``block22``.
        timestep: of diffusion models, their own training index t (25 and 200 in the paper).
        prompt: one text for all images; "" is the empty prompt.
        seed: of the noise, which is keyed by the image's content.
        draw: which of several noise draws.
        image_size: the side of the square in pixels; None is the backbone's own.
        tokens: ``flatten`` (a token a grid cell), ``pool`` (average), or ``conv`` (the paper's block).
        budget: tokens an image; the grid's cells for ``flatten``, a square number for ``pool``.
        width: of the tokens that ``conv`` makes; the others keep the layer's.
        dtype: of the tower's weights.
        revision: of a hub id.
    """

    backbone: str
    layer: str
    timestep: Index | None = None
    prompt: AnyText = ""
    seed: Seed = 0
    draw: Index = 0
    image_size: Pixels | None = None
    tokens: Tokens = "flatten"
    budget: Count = 256
    width: Count = 1024
    dtype: Dtype = "float32"
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "width"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` of tower {self.backbone} is {getattr(self, name)}: give 1 or more"
                )


@dataclass(frozen=True)
class ModelConfig:
    """A whole model.

    Attributes:
        language_model: a folder, a hub id, or a packaged name such as ``smollm2-135m-instruct``.
        towers: one or more, in the order in which their tokens are joined.
        fusion: ``interleave`` (a0 b0 a1 b1 ..., the paper's), ``sequence`` (all of a, then all of b), or
            ``channels`` (each tower fills its share of the language model's width).
        template: ``plain``, ``mpt``, ``vicuna_v1``, ``llama_2``, or ``tokenizer`` (its own chat template).
        system: the system message; None is the template's own.
        max_length: tokens of a sample, its images expanded.
        aspect: ``crop`` cuts the middle square; ``pad`` fills up to a square with the tower's mean colour.
        dtype: of the projectors' and the language model's weights.
        revision: of the language model's hub id.
    """

    language_model: str
    towers: tuple[TowerConfig, ...]
    fusion: Fusion = "interleave"
    template: str = "plain"
    system: AnyText | None = None
    max_length: Count = 2048
    aspect: Aspect = "crop"
    dtype: Dtype = "float32"
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.towers:
            raise ValueError("`towers` is empty: give one or more towers")
        if self.max_length < 1:
            raise ValueError(f"`max_length` is {self.max_length}: give 1 or more tokens")
