"""What each command takes: frozen dataclasses of plain values, whose field docstrings are the help pages."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import UseAppendAction

from llava_ext.config import ModelConfig, TowerConfig
from llava_ext.stages import Finetune, LoraOptions, Pretrain
from revelio.bounds import (
    Count,
    Device,
    Dtype,
    Existing,
    File,
    Folder,
    Index,
    NotNegative,
    OutFolder,
    Seed,
)

# The first row of Table 4; the others are in configs/llava.
PAPER_MODEL = ModelConfig(
    "mosaicml/mpt-7b-chat",
    (TowerConfig("clip-vit-l-14", "block22"),),
    template="mpt",
    dtype="bfloat16",
)


@dataclass(frozen=True)
class DataConfig:
    """LLaVA's data: a JSON file of conversations and the folder of their images."""

    json: Path = Path("data/chat.json")
    """The records, as LLaVA ships them."""

    images: Folder | None = None
    """The folder of the images; none for text only."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `revelio llava pretrain`."""

    out: OutFolder = Path("runs/llava/pretrain")
    """The run directory to create; `final/` in it is what stage 2 and chatting take."""

    data: DataConfig = field(default_factory=DataConfig)
    """The conversations: LLaVA's CC595k `chat.json`, for the paper's stage 1."""

    model: ModelConfig = PAPER_MODEL
    """Towers, fusion, language model, template."""

    cache: OutFolder | None = None
    """The towers' grids as `revelio llava cache` keeps them; none: the towers run in every step."""

    stage: Pretrain = field(default_factory=Pretrain)
    """How it is trained."""

    limit: Count | None = None
    """Only the first so many records."""

    too_long: Literal["stop", "drop"] = "stop"
    """What a record does that is longer than `model.max_length` with its images expanded."""

    bad_records: Literal["stop", "skip"] = "stop"
    """What a record does that can't be used (no picture, wrong turns, ...): stop, or be left out."""

    resume: bool = False
    """Go on with the run in `out`, from its last checkpoint."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `revelio llava finetune`."""

    pretrained: Existing | None = None
    """Projectors to begin with: the run directory or `final/` of stage 1, or a file or folder with
    LLaVA's `mm_projector.bin`; none: random ones."""

    out: OutFolder = Path("runs/llava/finetune")
    """The run directory to create; `final/` in it is the finished model."""

    data: DataConfig = field(default_factory=DataConfig)
    """The conversations: LLaVA-Instruct-80K, for the paper's stage 2."""

    model: ModelConfig = PAPER_MODEL
    """Towers, fusion, language model, template."""

    cache: OutFolder | None = None
    """The towers' grids as `revelio llava cache` keeps them; none: the towers run in every step."""

    stage: Finetune = field(default_factory=Finetune)
    """How it is trained."""

    lora: LoraOptions = field(default_factory=LoraOptions)
    """An adapter in place of all of the language model's weights."""

    limit: Count | None = None
    """Only the first so many records."""

    too_long: Literal["stop", "drop"] = "stop"
    """What a record does that is longer than `model.max_length` with its images expanded."""

    bad_records: Literal["stop", "skip"] = "stop"
    """What a record does that can't be used (no picture, wrong turns, ...): stop, or be left out."""

    resume: bool = False
    """Go on with the run in `out`, from its last checkpoint."""


@dataclass(frozen=True)
class CacheConfig:
    """Settings of `revelio llava cache`."""

    cache: OutFolder | None = None
    """The folder that gets one store a tower."""

    data: DataConfig = field(default_factory=DataConfig)
    """Whose images."""

    model: ModelConfig = PAPER_MODEL
    """Whose towers."""

    limit: Count | None = None
    """Only the images of the first so many records."""

    bad_records: Literal["stop", "skip"] = "stop"
    """What a record does that can't be used: stop, or be left out."""

    batch_size: Count = 16
    """Images a pass of a tower."""

    plan: bool = False
    """Only measure and print what it would cost."""


@dataclass(frozen=True)
class ShowConfig:
    """Settings of `revelio llava show`."""

    data: DataConfig = field(default_factory=DataConfig)
    """The conversations."""

    model: ModelConfig = PAPER_MODEL
    """Whose tokenizer, template and system message; no weights are loaded."""

    index: Index = 0
    """Which record, counted from 0."""

    colour: bool = True
    """Colours on a terminal; brackets mark what is learnt in any case."""


@dataclass(frozen=True)
class ChatConfig:
    """Which model, about which pictures."""

    model: str
    """A finished model: the `final` folder of a run, or a hub id."""

    image: UseAppendAction[tuple[File, ...]] = ()
    """A picture; may be repeated."""

    question: str | None = None
    """Answer this one and end; none: a conversation."""

    max_new_tokens: Count = 256
    """Longest answer."""

    temperature: NotNegative = 0.0
    """0: the likeliest token."""

    seed: Seed = 0
    """Of draws at a temperature above 0."""

    device: Device = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""

    dtype: Dtype | None = None
    """The number format the model runs in; none: as it was saved."""

    allow: UseAppendAction[tuple[str, ...]] = ()
    """A tower named MODULE:FUNCTION in the saved model's config that may be imported and run; may be
    repeated."""
