"""What the steering pipelines share: a pipeline opened, edits built from a config, lists of latents read."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from revelio.backbones.base import DiffusionModel
from revelio.backbones.config import BackboneConfig
from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.backbones.registry import load_backbone
from revelio.pipelines.convert_sae import read_sae
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import Concept
from revelio.steering.config import EditConfig, PromptsConfig
from revelio.steering.edits import Edit, LatentChange, check_number
from revelio.steering.prompts import Prompt, read_prompts
from revelio.trust import printable


def open_pipeline(config: BackboneConfig) -> PipelineLayers:
    """The whole model as a pipeline with named layers.

    Raises:
        KeyError: an unknown model.
        ValueError: it does not draw, or is of a kind that can't be steered.
    """
    backbone = load_backbone(
        config.name,
        revision=config.revision,
        image_size=config.image_size,
        dtype=config.dtype,
        attention=config.attention,
        device=config.device,
    )
    if not isinstance(backbone, DiffusionModel):
        raise ValueError(f"{config.name} does not draw pictures: only diffusion models are steered")
    pipeline = backbone.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return PipelineLayers(pipeline, backbone.name)


def open_ksae(path: str, device: torch.device | str = "cpu") -> KSparseAutoencoder:
    """A k-SAE of ours, or in a released layout, as the published concept steerers are.

    Raises:
        ValueError: there is none.
    """
    place = Path(path)
    ksae = read_sae(place) if place.exists() else KSparseAutoencoder.from_pretrained(path)
    return ksae.to(device).eval()


def parse_latents(words: Sequence[str], default: float) -> dict[int, float]:
    """`13:2.0` as latent 13 with the value 2.

    Raises:
        ValueError: a word is no latent, or one stands twice.
    """
    found: dict[int, float] = {}
    for word in words:
        number, colon, value = word.partition(":")
        if not number.isdecimal() or (colon and not value):
            raise ValueError(f"{printable(word)!r} is no latent: give its number, or NUMBER:VALUE")
        if int(number) in found:
            raise ValueError(f"latent {number} is given twice")
        found[int(number)] = (
            check_number(value, f"the value of latent {number}") if colon else default
        )
    return found


def the_prompts(config: PromptsConfig) -> list[Prompt]:
    """The prompts that a config names."""
    return read_prompts(config.prompts, config.column, config.split)[: config.limit]


def build_edits(layers: PipelineLayers, config: EditConfig) -> list[Edit]:
    """The edits of a config, at strength 1.

    Raises:
        KeyError: an unknown layer.
        ValueError: nothing to edit, or something that does not fit the model.
    """
    latents = config.layer is not None or config.ksae is not None or bool(config.latents)
    if not config.concept and not latents:
        raise ValueError("nothing to steer by: give a concept, or layer, ksae and latents")
    mask = None if config.mask is None else read_mask(config.mask)
    places = {"branch": config.branch, "timesteps": config.timesteps, "mask": mask}
    edits: list[Edit] = []
    for folder in config.concept:
        concept = Concept.load(folder)
        concept.check(layers.name, config.layer)
        edits.append(concept.edit(1.0, **places))
    if latents and (config.ksae is not None or config.latents):
        edits.append(_of_latents(layers, config, **places))
    return edits


def _of_latents(layers: PipelineLayers, config: EditConfig, **places: object) -> Edit:
    if config.layer is None or config.ksae is None or not config.latents:
        raise ValueError("latents are edited with all of layer, ksae and latents")
    width = sum(layers.parts(config.layer).values())
    ksae = open_ksae(config.ksae, layers.denoiser.device)
    if ksae.d != width:
        raise ValueError(
            f"the k-SAE is {ksae.d} wide, layer {config.layer} of {layers.name} {width}: it was trained on "
            "another layer or model"
        )
    made_of = ksae.trained_on
    for name, wanted in (("model", layers.name), ("layer", config.layer)):
        if made_of.get(name) not in (None, wanted):
            raise ValueError(
                f"the k-SAE was trained on {name} {printable(made_of[name])}, not {wanted}: choose another"
            )
    values = parse_latents(config.latents, 0.0)
    change = LatentChange(ksae, values, config.operation, config.read, config.where)
    return Edit(config.layer, change, width, 1.0, **places)  # type: ignore[arg-type]


def read_mask(path: Path) -> Tensor:
    """A mask from a picture: white is 1.

    Raises:
        ValueError: it is no picture.
    """
    try:
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L"), dtype=np.float32)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{printable(path)} is no picture: {printable(error)}") from error
    return torch.from_numpy(grey / 255.0)
