"""Every setting of ``llava_ext``, once: what a model is made of, how a stage trains it, what a command takes.

The four rows of the paper's Table 4 (SPEC section 3) are four :class:`ModelConfig`, in ``configs/llava``:
``clip``, ``clip`` + ``dinov2``, ``clip`` + ``sd`` at t = 25, the same at t = 200. How a stage trains is in
:mod:`llava_ext.stages`. The library's functions take these objects, and the commands parse into them: no
setting is declared twice. Nothing here needs torch.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction

from llava_ext.stages import Finetune, LoadIn, LoraOptions, Pretrain, StageOptions
from revelio.bounds import (
    AnyText,
    Count,
    Device,
    Dtype,
    Existing,
    File,
    Index,
    NotNegative,
    OutFolder,
    PathFields,
    Pictures,
    Pixels,
    Place,
    Seed,
    Workers,
)

# It need not be there where a cache stands for the images: whoever reads them sees whether it is.
ImageFolder = Annotated[Path, Place("folder"), Pictures()]
Tokens = Literal["flatten", "pool", "conv", "resample"]
Fusion = Literal["interleave", "sequence", "channels"]
Aspect = Literal["crop", "pad"]
Keep = Literal["grids", "int8", "latents"]
ExportForm = Literal["merged", "llava", "transformers"]

IMAGE_INDEX = -200  # stands for one image in `input_ids`; LLaVA's own number
IGNORE_INDEX = -100  # a label that is not learnt; PyTorch's own number
IMAGE_TOKEN = "<image>"  # the same in text

QUESTION = "question"  # as a tower's prompt: what is asked about the picture


@dataclass(frozen=True)
class TowerConfig:
    """A vision tower: a frozen backbone, one of its layers, and how its grid becomes tokens.

    Attributes:
        backbone: a name that ``revelio backbones`` lists, a folder, a hub id, ``module:function``, or a tower
            of your own by the name it was registered under.
        layer: the layer; LLaVA's ``hidden_states[-2]`` of CLIP ViT-L/14 is ``block22``. Several, all from one
            pass and joined along channels on the first one's grid: ``up_ft1+up_ft2``.
        timestep: of diffusion models, their own training index t (25 and 200 in the paper).
        timesteps: several in the place of ``timestep``, joined along channels; the picture is encoded once.
        prompt: one text for all images; "" is the empty prompt; ``question`` is the first thing that is asked
            about the picture, as in arXiv 2507.07106: of such a tower a cache holds latents only.
        seed: of the noise, which is keyed by the image's content.
        draw: which of several noise draws.
        image_size: the side of the square in pixels; None is the backbone's own.
        tokens: ``flatten`` (a token a grid cell), ``pool`` (average), ``conv`` (the paper's block), or
            ``resample`` (learned queries that attend to all cells).
        budget: tokens an image; the grid's cells for ``flatten``, a square number for ``pool``, any number
            for ``resample``.
        width: of the tokens that ``conv`` and ``resample`` make; the others keep the layer's.
        normalize: bring each token to mean 0 and deviation 1 before the linear layers. Towers' layers differ
            in scale by a factor of ten and more, and the quietest learns slowest.
        dtype: of the tower's weights.
        revision: of a hub id.
    """

    backbone: str
    layer: str
    timestep: Index | None = None
    timesteps: tuple[Index, ...] = ()
    prompt: AnyText = ""
    seed: Seed = 0
    draw: Index = 0
    image_size: Pixels | None = None
    tokens: Tokens = "flatten"
    budget: Count = 256
    width: Count = 1024
    normalize: bool = False
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
        template: ``plain``, ``mpt``, ``vicuna_v1``, ``llama_2``, ``llava_llama_2``, or
            ``tokenizer`` (its own chat template).
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

    @property
    def asks(self) -> bool:
        """Whether a tower is prompted by the question."""
        return any(tower.prompt == QUESTION for tower in self.towers)


# The first row of Table 4; the others are in configs/llava.
PAPER_MODEL = ModelConfig(
    "mosaicml/mpt-7b-chat",
    (TowerConfig("clip-vit-l-14", "block22"),),
    template="mpt",
    dtype="bfloat16",
)


@dataclass(frozen=True)
class ConversationData(PathFields):
    """LLaVA's data: a JSON file of conversations and the folder of their images."""

    json: Path = Path("data/chat.json")
    """The records, as LLaVA ships them."""

    images: ImageFolder | None = None
    """The folder of the images; none for text only."""


@dataclass(frozen=True, kw_only=True)
class RecordsConfig(PathFields):
    """Which of a file's records are taken: shared by all commands that read them."""

    limit: Count | None = None
    """Only the first so many records."""

    bad_records: Literal["stop", "skip"] = "stop"
    """What to do with records that can't be used (no picture, wrong turns, ...): stop, or leave them out."""


@dataclass(frozen=True, kw_only=True)
class SamplesConfig(RecordsConfig):
    """Which conversations a model sees."""

    data: ConversationData = field(default_factory=ConversationData)
    """The conversations: LLaVA's CC595k `chat.json` for the paper's stage 1, LLaVA-Instruct-80K for
    stage 2."""

    model: ModelConfig = PAPER_MODEL
    """Towers, fusion, language model, template."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(SamplesConfig):
    """Settings of `revelio llava cache`."""

    cache: OutFolder | None = None
    """The folder that gets one store a tower."""

    batch_size: Count = 16
    """Images per pass of a tower."""

    keep: Keep = "grids"
    """What is kept of an image: `grids`, the towers' outputs in float16 (averaged where tokens are `pool`);
    `int8`, the same in half the space; `latents`, what the towers start from (VAE latents, else the picture
    in 8 bits): the least space, and they run on from there in every step of training."""

    workers: Workers = 0
    """Processes that read and resize pictures while the towers run."""

    plan: bool = False
    """Only measure and print what it would cost."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SamplesConfig):
    """What both stages take; see :class:`PretrainConfig` and :class:`FinetuneConfig`."""

    out: OutFolder
    """The run directory to create; `final/` in it is what stage 2 and chatting take."""

    validation_data: File | None = None
    """A JSON of conversations about pictures in the same folder, whose loss is measured at each
    checkpoint."""

    cache: OutFolder | None = None
    """What `revelio llava cache` kept of the pictures; none: the towers see the pictures in every step."""

    stage: StageOptions
    """How it is trained."""

    load_in: LoadIn | None = None
    """Quantise the language model as it is loaded (bitsandbytes: NF4 or LLM.int8), so that a 7B model takes 4
    or 7 GB: it stays frozen, and stage 2 trains an adapter on it (QLoRA), which fits the plain model, too."""

    too_long: Literal["stop", "drop"] = "stop"
    """What to do with records that are longer than `model.max_length` with their images expanded."""

    check_pictures: bool = True
    """Decode every picture before anything is trained, so that a damaged one is a bad record and not a stop
    in the middle; off: only see whether the files are there. With a cache no picture is needed."""

    changed_inputs: Literal["stop", "accept"] = "stop"
    """What to do where a resumed run's records, pictures, towers or language model have changed since it
    began: stop, or go on with the new ones."""

    resume: bool = False
    """Go on with the run in `out`, from its last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Settings of `revelio llava pretrain`."""

    out: OutFolder = Path("runs/llava/pretrain")
    stage: Pretrain = field(default_factory=Pretrain)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Settings of `revelio llava finetune`."""

    pretrained: Existing | None = None
    """Projectors to begin with: the run directory or `final/` of stage 1, or a file or folder with
    LLaVA's `mm_projector.bin`; none: random ones."""

    out: OutFolder = Path("runs/llava/finetune")
    stage: Finetune = field(default_factory=Finetune)

    lora: LoraOptions = field(default_factory=LoraOptions)
    """An adapter in place of all of the language model's weights."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig(SamplesConfig):
    """Settings of `revelio llava show`; no weights are loaded."""

    cache: OutFolder | None = None
    """What `revelio llava cache` kept of the pictures, which need not be there then."""

    index: Index = 0
    """Which record, counted from 0."""

    colour: bool = True
    """Colours on a terminal; brackets mark what is learnt in any case."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How an answer is made."""

    max_new_tokens: Count = 256
    """Longest answer."""

    temperature: NotNegative = 0.0
    """0: the likeliest token, the same answer every time."""

    seed: Seed = 0
    """Seed of answers drawn at a temperature above 0."""

    def decoding(self) -> dict[str, Any]:
        """These settings alone, by name, of a config that has more."""
        return {each.name: getattr(self, each.name) for each in fields(Decoding)}


@dataclass(frozen=True, kw_only=True)
class FinishedConfig(PathFields):
    """A finished model, and where it runs."""

    model: str
    """A finished model: the `final` folder of a run, or a hub id."""

    device: Device = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""

    dtype: Dtype | None = None
    """The number format the model runs in; none: as it was saved."""

    allow: UseAppendAction[tuple[str, ...]] = ()
    """A tower named MODULE:FUNCTION in the saved model's config that may be imported and run; may be
    repeated."""


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(FinishedConfig, Decoding):
    """Which finished model answers, where, and how."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(AnswerConfig):
    """Settings of `revelio llava chat`."""

    image: UseAppendAction[tuple[File, ...]] = ()
    """A picture; may be repeated."""

    question: str | None = None
    """Answer this one and end; none: a conversation."""

    ksae: UseAppendAction[tuple[str, ...]] = ()
    """A k-SAE that `edit` is about, as LAYER=FOLDER; may be repeated. Layers are `tower0` (the tokens of the
    first tower), `projected0` (after its projector) and `block5` (of the language model)."""

    edit: UseAppendAction[tuple[str, ...]] = ()
    """Answer with a latent changed at every token, as LAYER:LATENT:STRENGTH (so much of it is added, or taken
    away below 0) or LAYER:LATENT:off (ablated); may be repeated."""


@dataclass(frozen=True, kw_only=True)
class TokensConfig(RecordsConfig, FinishedConfig):
    """Settings of `revelio llava tokens`."""

    data: ConversationData = field(default_factory=ConversationData)
    """Conversations about one picture each; the tokens are of their first questions."""

    cache: OutFolder | None = None
    """What `revelio llava cache` kept of the pictures; none: the towers see the pictures."""

    layer: str
    """`projected0` (after a tower's projector) or `block5` (of the language model, at the picture's tokens).
    The tokens of a tower itself are in its cache already."""

    out: OutFolder
    """The store to write."""

    batch_size: Count = 16
    """Conversations per pass."""


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(AnswerConfig):
    """Settings of `revelio llava explain`."""

    image: UseAppendAction[tuple[File, ...]]
    """A picture; may be repeated, and each gets a part of the page."""

    question: str
    """What is asked about each."""

    answer: str | None = None
    """Explain this answer in the place of the model's own."""

    ksae: UseAppendAction[tuple[str, ...]]
    """A k-SAE inside the model, as LAYER=FOLDER; may be repeated. See `revelio llava chat --help`."""

    latents: Count = 6
    """Latents shown of each layer, those with the largest effects."""

    pairs: Count = 16
    """(latent, token) pairs that are taken away to check the effects."""

    out: OutFolder
    """The folder that gets the page (`index.html`) and the numbers (`explanation.json`)."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(PathFields):
    """Settings of `revelio llava export`."""

    model: str
    """A finished model: the `final` folder of a run, or a hub id."""

    form: ExportForm = "merged"
    """`merged` folds the adapter into the language model; `llava` and `transformers` write the projectors
    under the names that they read."""

    out: OutFolder
    """The folder to write, of its own."""
