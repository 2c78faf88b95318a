"""What the steering pipelines share: a pipeline opened, edits built from a config, lists of latents read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from revelio.backbones.base import DiffusionModel
from revelio.backbones.config import BackboneConfig
from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.backbones.registry import load_backbone
from revelio.data.picture import decoded
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
    if not config.concept and not (config.layer and config.ksae and config.latent_values):
        raise ValueError(
            "nothing to steer by: give a concept, or all of layer, ksae and latent_values"
        )
    edits: list[Edit] = []
    for folder in config.concept:
        concept = Concept.load(folder)
        concept.check(layers.name, config.layer)
        if config.ksae is None:
            edits.append(concept.edit(1.0, **_places(config)))
        elif concept.latents is None:
            raise ValueError(
                f"the concept {printable(folder)} has no latents to edit: leave ksae out"
            )
        else:
            values = dict.fromkeys(concept.latents, 0.0)
            edits.append(_of_latents(layers, config, concept.layer, values))
    if config.latent_values:
        if config.layer is None:
            raise ValueError("whose latents? give their layer")
        edits.append(
            _of_latents(layers, config, config.layer, parse_latents(config.latent_values, 0.0))
        )
    return edits


def _places(config: EditConfig) -> dict[str, Any]:
    mask = None if config.mask is None else read_mask(config.mask)
    return {"branch": config.branch, "timesteps": config.timesteps, "mask": mask}


def _of_latents(
    layers: PipelineLayers, config: EditConfig, layer: str, values: dict[int, float]
) -> Edit:
    if config.ksae is None:
        raise ValueError("latents are a k-SAE's: give ksae")
    width = sum(layers.parts(layer).values())
    ksae = open_ksae(config.ksae, layers.denoiser.device)
    if ksae.d != width:
        raise ValueError(
            f"the k-SAE is {ksae.d} wide, layer {layer} of {layers.name} {width}: it was trained on "
            "another layer or model"
        )
    for name, wanted in (("model", layers.name), ("layer", layer)):
        if ksae.trained_on.get(name) not in (None, wanted):
            raise ValueError(
                f"the k-SAE was trained on {name} {printable(ksae.trained_on[name])}, not {wanted}: "
                "choose another"
            )
    change = LatentChange(ksae, values, config.operation, config.read, config.where)
    return Edit(layer, change, width, 1.0, **_places(config))


def read_mask(path: Path) -> Tensor:
    """A mask from a picture: white is 1.

    Raises:
        ImageError: it is no picture.
    """
    with decoded(path, str(path)) as picture:
        return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255.0)
