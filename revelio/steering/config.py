"""Every setting of concept steering, declared once; command lines inherit it. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from revelio.backbones.config import BackboneConfig
from revelio.bounds import (
    AnyText,
    Count,
    File,
    Folder,
    Index,
    NotEmpty,
    NotNegative,
    OutFile,
    OutFolder,
    PathFields,
    Pixels,
    Seed,
    Share,
)
from revelio.endpoint import Settings

Operation = Literal["scale", "clamp", "ablate", "add"]


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(PathFields):
    """Where prompts come from."""

    renamed: ClassVar[dict[str, str]] = {"prompts": "prompts-file"}

    prompts_file: str | None = None
    """A file of one prompt a line, a `.csv` or `.tsv` table with a header, or a Hugging Face data set."""

    texts: tuple[str, ...] = ()
    """Prompts themselves, instead of a file; of a class-conditional model, class names or ids."""

    column: str = "prompt"
    """The column of a table that holds the prompts."""

    split: str | None = None
    """The split of a data set; none: its only one, or `train`."""

    limit: Count | None = None
    """Take only the first so many prompts."""


@dataclass(frozen=True, kw_only=True)
class ExtractTextConfig(PromptsConfig):
    """Which text layers of which prompts to store."""

    out: OutFolder
    """The folder that gets one store for each layer."""

    layers: Annotated[tuple[str, ...], NotEmpty()]
    """Text layers, counted from 0: `text_encoder.block9`; SDXL's two encoders joined are
    `text_encoder.block10+text_encoder_2.block28`; T5 is `text_encoder_2` in Flux, `text_encoder_3` in SD3."""

    padding: Literal["drop", "keep"] = "drop"
    """Whether the positions after the end of a text get rows; the published k-SAEs were trained on all."""

    renamed: ClassVar[dict[str, str]] = {"dtype": "store-dtype"}

    store_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The number format of the stored activations."""

    shard_prompts: Count = 256
    """Prompts a shard."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""

    resume: bool = False
    """Go on with stores that are there; the result has the same bytes as an uninterrupted run."""


@dataclass(frozen=True, kw_only=True)
class ConceptConfig(PathFields):
    """What a concept is made of: texts, activation stores of pictures, latents, or other concepts."""

    out: OutFolder
    """The folder of the concept."""

    layer: str | None = None
    """The layer it is for; a store's own where stores are given."""

    ksae: str | None = None
    """The k-SAE of that layer, a folder or hub id; none: the difference of means, without a k-SAE."""

    texts: tuple[str, ...] = ()
    """Texts that say the concept."""

    against: tuple[str, ...] = ()
    """Texts that say something else: the concept is the contrast."""

    texts_file: File | None = None
    """A file with more texts, one a line or a table."""

    against_file: File | None = None
    """A file with more texts of something else."""

    store: Folder | None = None
    """A store of activations of pictures of the concept; a k-SAE of cells takes whole grids, or cells."""

    against_store: Folder | None = None
    """A store of other pictures; none: those of `store` outside `class_name`."""

    class_name: str | None = None
    """Take the pictures of one class of `store` for the concept."""

    renamed: ClassVar[dict[str, str]] = {"latents": "latent-values", "strengths": "strength-range"}

    latent_values: tuple[str, ...] = ()
    """Latents with weights, as `13:2.0`; without a weight it is 1."""

    concepts: tuple[Folder, ...] = ()
    """Concepts to add up."""

    weights: tuple[float, ...] = ()
    """The concepts' weights; none: 1 each."""

    find: Index = 0
    """Keep only so many latents that fire for the concept and not for the rest, found on one half of the
    texts or pictures and judged on the other; 0: the whole contrast."""

    specificity: Share = 0.9
    """The least share of a found latent's mean code that must be the concept's."""

    codes: Literal["dense", "sparse"] = "dense"
    """`dense`: ReLU of all pre-activations, as released; `sparse`: what TopK keeps."""

    positions: Literal["each", "mean"] = "each"
    """A vector for each token position, as released, or the mean over those that are no padding."""

    strength_range: tuple[float, float] = (-1.0, 1.0)
    """The range of strengths that the card suggests."""

    seed: Seed = 0
    """Seed of the halves, where latents are found."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model; of a concept of stores, the stores' own."""


@dataclass(frozen=True, kw_only=True)
class EditConfig(PathFields):
    """What is changed while a model draws: concepts, or latents of one layer."""

    concept: tuple[Folder, ...] = ()
    """Concepts that `revelio concept` made; several are added, each times the strength. With `ksae`, the
    latents of a concept that has some are edited instead: `operation` ablate takes them out."""

    weights: tuple[float, ...] = ()
    """Weights of the concepts, which the strength is multiplied by; none: 1 each."""

    layer: str | None = None
    """The layer whose latents are edited, with `latent_values`; none: what the k-SAE was trained on."""

    ksae: tuple[str, ...] = ()
    """The k-SAE of that layer: a folder or hub id; of several concepts one for each, or one for all."""

    renamed: ClassVar[dict[str, str]] = {"latents": "latent-values", "timesteps": "timestep-range"}

    latent_values: tuple[str, ...] = ()
    """Latents with values, as `13:2.0 487:0`; without a value it is 0."""

    operation: Operation = "scale"
    """What a value does at strength 1: `scale` multiplies the latent's code, `clamp` sets it, `add` adds to
    it, `ablate` sets it to 0. What the k-SAE does not explain stays."""

    read: Literal["cells", "pooled"] | None = None
    """Encode every cell or token by itself, or the mean of all cells and change all alike; none: as the k-SAE
    was trained, cells where it does not say."""

    where: Literal["everywhere", "fires"] = "everywhere"
    """`add` and `clamp` everywhere, or only where the latent fires."""

    branch: Literal["opposed", "conditional", "both"] | None = None
    """Which calls of classifier-free guidance are edited: `conditional`, `both` alike, or `opposed`, which
    subtracts from the unconditional call what it adds to the conditional one; none: `opposed` for concepts,
    `conditional` for latents, and `both` in Flux's denoiser, where the two calls look the same."""

    timestep_range: tuple[Index, Index] | None = None
    """The first and the last training timestep at which a denoiser's layer is edited (0 is no noise)."""

    mask: File | None = None
    """A black and white picture of the size of the layer's grid: where a denoiser's layer is edited."""


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How pictures are drawn."""

    steps: Count = 50
    """Steps of the model's own scheduler."""

    guidance: NotNegative = 7.5
    """The guidance scale, where the prompts' file says none; up to 1: no guidance."""

    negative_prompt: AnyText = ""
    """What not to draw, for all prompts."""

    images_per_prompt: Count = 1
    """Pictures a prompt, of seeds that follow each other."""

    seed: Seed = 0
    """Seed of the first picture of a prompt, where the prompts' file has none."""

    size: Pixels | None = None
    """The side of the pictures in pixels; none: the model's own."""

    batch_size: Count = 4
    """Prompts at a time; each picture has a noise of its own, whatever it is batched with."""


@dataclass(frozen=True, kw_only=True)
class SteerConfig(PromptsConfig, EditConfig, DrawConfig):
    """What to draw, steered how."""

    out: OutFolder
    """The folder for pictures, `sheet.png` and `report.json`. What a stopped command has drawn is kept in
    `drawn` in it: the same command goes on with that."""

    strength: Annotated[tuple[float, ...], NotEmpty()] = (-0.5, 0.0, 0.5)
    """Strengths, a column of the sheet each; 0 is the plain model, below 0 less of the concept. They do not
    carry over from one model, layer or concept to another: an opposed edit is multiplied by the guidance
    scale, and a vector may be long or short beside the states it is added to. Begin near 0 and raise it
    until pictures break. Published: -0.5 removes nudity from SD-1.4, -0.7 violence, 0 to -0.3 for Flux."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""


@dataclass(frozen=True, kw_only=True)
class SteerEvalConfig(PromptsConfig, EditConfig, DrawConfig, Settings):
    """How well a concept is erased or brought in, by a judge."""

    out: OutFolder
    """The folder for `steering.json`, `steering.html`, `sheet.png` and the pictures. What a stopped command
    has drawn is kept in `drawn` in it: the same command goes on with that."""

    target: Annotated[tuple[str, ...], NotEmpty()]
    """The class that stands for the concept; several where several concepts are steered at once."""

    target_column: str = "class"
    """The column of the prompts' table with the class that each prompt names."""

    group_column: str | None = None
    """A column that sorts the prompts of the target, such as into named, paraphrased and adversarial ones:
    the target's rate is told for each; none: by whether a prompt's text holds the target's name."""

    judge: str = "clip-vit-b-32"
    """What classifies the pictures: a CLIP model by name or folder, which chooses among the classes
    zero-shot; `transformers:MODEL`, an image classifier by folder or hub id; `diffc:FOLDER`;
    `endpoint:MODEL`, a vision-language model; or `module:function` of yours (pictures -> class names)."""

    template: str = "a photo of a {}"
    """The text of a class for a zero-shot judge."""

    detector: str | None = None
    """What decides whether the target shows, in place of the judge, which then judges only what else
    survives: `nudenet` (its package), `transformers:MODEL`, or `module:function` of yours (pictures ->
    scores)."""

    detector_labels: tuple[str, ...] = ()
    """The detector's labels that count as the target; none: NudeNet's exposed parts."""

    detector_threshold: Share = 0.45
    """The least score at which the target shows; published for NudeNet: 0.45."""

    features: str | None = None
    """A backbone in whose activations the distance of untouched pictures is measured, beside pixels."""

    features_layer: str | None = None
    """Its layer; none: the last."""

    each: bool = False
    """Measure the concepts one by one instead of all at once: a study of layers, or of sizes of k-SAEs."""

    strength: Annotated[tuple[float, ...], NotEmpty()] = (-0.25, -0.5, -1.0)
    """Strengths of the curve; which ones suit depends on model, guidance and concept, as in `steer`."""

    baselines: tuple[Literal["negative-prompt", "difference-of-means", "random-direction"], ...] = (
        "negative-prompt", "difference-of-means", "random-direction",
    )  # fmt: skip
    """What else is measured, at the same strengths where it has one; the plain model always is. A random
    direction is that of a concept's vector, a negative prompt that of a pipeline that takes one."""

    means: Folder | None = None
    """A concept made without a k-SAE, for the baseline `difference-of-means`."""

    bootstrap: Count = 2000
    """Resamples of prompts and seeds for the 95 % intervals."""

    renamed: ClassVar[dict[str, str]] = {"cache": "reply-cache"}

    reply_cache: OutFile | None = None
    """The file of an endpoint's replies; none: beside the folder (eval -> eval.cache.sqlite)."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""
