"""What the steering pipelines share: a pipeline opened, edits built from a config, lists of latents read."""

from collections.abc import Sequence
from dataclasses import replace
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
from revelio.device_memory import placed
from revelio.pipelines.convert_sae import read_sae
from revelio.pipelines.inputs import open_sae, sae_folder
from revelio.sae.inputs import trained_stores
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import Concept
from revelio.steering.config import EditConfig, PromptsConfig
from revelio.steering.edits import Edit, LatentChange, Read, check_number
from revelio.steering.prompts import Prompt, prompts_of, read_prompts
from revelio.trust import printable
from revelio.wording import plural


def open_pipeline(config: BackboneConfig) -> PipelineLayers:
    """The whole model as a pipeline with named layers.

    Raises:
        KeyError: an unknown model.
        ValueError: it does not draw, or is of a kind that can't be steered.
    """
    backbone = load_backbone(config)
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
    if sae_folder(path) or not Path(path).exists():
        return open_sae(path, str(device))
    ksae = placed(read_sae(Path(path)), device, f"the k-SAE at {printable(path)}").eval()
    ksae.kernel = fastest_kernel(ksae)
    return ksae


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


def the_prompts(
    config: PromptsConfig, class_column: str | None = None, group_column: str | None = None
) -> list[Prompt]:
    """The prompts that a config names.

    Args:
        config: where they come from.
        class_column: of a table, the column with the class that each names, which it must have then.
        group_column: of a table, the column with the group that each belongs to.

    Raises:
        ValueError: there are none, or they are said twice.
    """
    if (config.prompts_file is None) == (not config.texts):
        raise ValueError("which prompts? give either texts, or a file of prompts")
    if config.prompts_file is None:
        if class_column is not None:
            raise ValueError("texts name no class: give prompts, a table with a column of classes")
        return prompts_of(config.texts)[: config.limit]
    found = read_prompts(
        config.prompts_file,
        config.column,
        config.split,
        class_column=class_column,
        group_column=group_column,
    )
    return found[: config.limit]


def build_edits(layers: PipelineLayers, config: EditConfig) -> list[Edit]:
    """The edits of a config, at strength 1: one a concept, then that of the latents.

    Raises:
        KeyError: an unknown layer.
        ValueError: nothing to edit, or something that does not fit the model.
    """
    if not config.concept and not (config.ksae and config.latent_values):
        raise ValueError("nothing to steer by: give a concept, or ksae and latent_values")
    if config.latent_values and len(config.ksae) != 1:
        raise ValueError("whose latents? give one ksae")
    edits = _of_concepts(layers, config)
    if config.latent_values:
        values = parse_latents(config.latent_values, 0.0)
        edits.append(_of_latents(layers, config, config.ksae[0], config.layer, values))
    return edits


def _of_concepts(layers: PipelineLayers, config: EditConfig) -> list[Edit]:
    count = len(config.concept)
    weights = _one_each("weights", config.weights or (1.0,) * count, count)
    saes = _one_each("k-SAEs", config.ksae * count if len(config.ksae) == 1 else config.ksae, count)
    edits: list[Edit] = []
    for place, (folder, weight) in enumerate(zip(config.concept, weights, strict=True)):
        concept = Concept.load(folder)
        concept.check(layers.name, config.layer)
        if not saes or config.latent_values:
            edits.append(concept.edit(weight, **_places(config)))
        elif concept.latents is None:
            raise ValueError(
                f"the concept {printable(folder)} has no latents to edit: leave ksae out"
            )
        else:
            values = dict.fromkeys(concept.latents, 0.0)
            one = _of_latents(layers, config, saes[place], concept.layer, values)
            edits.append(replace(one, strength=weight))
    return edits


def _one_each(what: str, given: Sequence[Any], count: int) -> Sequence[Any]:
    if given and len(given) != count:
        raise ValueError(f"{len(given)} {what} for {plural(count, 'concept')}: give one each")
    return given


def _places(config: EditConfig) -> dict[str, Any]:
    mask = None if config.mask is None else read_mask(config.mask)
    return {"branch": config.branch, "timesteps": config.timestep_range, "mask": mask}


def _of_latents(
    layers: PipelineLayers,
    config: EditConfig,
    path: str,
    layer: str | None,
    values: dict[int, float],
) -> Edit:
    ksae = open_ksae(path, layers.denoiser.device)
    layer = layer or ksae.trained_on.get("layer")
    if not isinstance(layer, str):
        raise ValueError(
            f"the k-SAE {printable(path)} does not say which layer it is of: give layer"
        )
    width = sum(layers.parts(layer).values())
    if ksae.d != width:
        raise ValueError(
            f"the k-SAE is {ksae.d} wide, layer {layer} of {layers.name} {width}: it was trained on "
            "another layer or model"
        )
    check_trained_on(ksae, path, layers.name, layer)
    read = config.read or reading_of(ksae)
    change = LatentChange(ksae, values, config.operation, read, config.where)
    return Edit(layer, change, width, 1.0, **_places(config))


def check_trained_on(ksae: KSparseAutoencoder, path: str, model: str | None, layer: str) -> None:
    """See that a k-SAE was trained on a model's layer, where it says what it was trained on.

    Args:
        ksae: the k-SAE.
        path: where it came from, for messages.
        model: the model's name; None: not known.
        layer: the layer.

    Raises:
        ValueError: it was trained on another, or on several others.
    """
    for name, wanted in (("model", model), ("layer", layer)):
        known = [one.get(name) for one in trained_stores(ksae.trained_on)]
        if wanted is not None and None not in known and wanted not in known:
            said = printable(", ".join(map(str, dict.fromkeys(known))))
            raise ValueError(
                f"the k-SAE {printable(path)} was trained on {name} {said}, not {printable(wanted)}: choose "
                "another"
            )


def reading_of(ksae: KSparseAutoencoder) -> Read:
    """What a k-SAE reads: the mean of all cells where it was trained on such, else every cell or token."""
    # Stores of pictures say how they are pooled, and are averaged to train on; those of tokens don't.
    pictures = all("pool" in one for one in trained_stores(ksae.trained_on))
    return "pooled" if pictures and ksae.trained_on.get("rows_are") != "cells" else "cells"


def read_mask(path: Path) -> Tensor:
    """A mask from a picture: white is 1.

    Raises:
        ImageError: it is no picture.
    """
    with decoded(path, str(path)) as picture:
        return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255.0)
