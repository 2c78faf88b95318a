"""Which of our loaders takes a model, and what its config files say of it: no weights, no torch.

Families of diffusion models register themselves (:func:`revelio.backbones.diffusion.base.register_family`):
every module of :mod:`revelio.backbones.diffusion` that is no shared part is one. Vision transformers are told
by the ``model_type`` of their ``config.json``.
"""

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from revelio.backbones import diffusion
from revelio.backbones.diffusion.base import DiffusionBackbone, registered_families
from revelio.backbones.layers import vit_layers
from revelio.backbones.source import Description, Source, kinds_of
from revelio.trust import printable

# Modules of the package that are no family's.
SHARED = {
    "base",
    "conditioning",
    "pipeline_layers",
    "schedule",
    "scheduler",
    "t5",
    "text_encoder",
    "transformer",
    "unet",
    "vae",
}
# Parts that steer the denoiser: only a family that lists them computes what they do (SDXL, SD3, unCLIP).
STRANGE_PARTS = ("text_encoder_2", "text_encoder_3", "prior", "image_encoder", "image_normalizer")
VITS = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
VIT_LOADERS = {"clip": "revelio.backbones.clip:load", "dinov2": "revelio.backbones.dinov2:load"}

Family = type[DiffusionBackbone] | str


def diffusion_families() -> list[type[DiffusionBackbone]]:
    """All families of diffusion models; imports their files."""
    for module in pkgutil.iter_modules(diffusion.__path__):
        if module.name not in SHARED:
            import_module(f"{diffusion.__name__}.{module.name}")
    return registered_families()


def supported() -> str:
    """The families, for a message."""
    titles = ", ".join(family.title for family in diffusion_families())
    return f"{titles}, CLIP and DINOv2 models"


def family_of(source: Source) -> Family:
    """The family of a diffusion model, or the name of a kind of ViT (a key of ``VIT_LOADERS``).

    Raises:
        ValueError: the model is of no supported family.
    """
    index = source.find_json("model_index.json")
    if index is None:
        return _vit(source)
    for family in diffusion_families():
        if _takes(family, index):
            return family
    lacking = _lacking(index)
    if lacking:
        raise ValueError(f"model_index.json of {source.name} lists no {lacking}")
    raise _unsupported(source, index.get("_class_name"))


def _vit(source: Source) -> str:
    file, reason = source.look_up("config.json")
    if file is None:
        raise ValueError(
            reason
            or f"{source.name} holds neither model_index.json nor config.json: "
            f"supported are {supported()}. A U-Net or transformer in a single file is given behind the model "
            f"that it takes the rest from, such as sd-1.5+{source.location}"
        )
    config = source.read_file(file, "config.json")
    found = config.get("model_type") or config.get("_class_name")
    if isinstance(found, str) and found in VITS:
        return VITS[found]
    raise _unsupported(source, found)


def _unsupported(source: Source, found: object) -> ValueError:
    return ValueError(f"{source.name} is a {printable(found)}: supported are {supported()}")


def _takes(family: type[DiffusionBackbone], index: Mapping[str, Any]) -> bool:
    """Whether model_index.json lists the family's parts, and none that it does not compute."""
    unused = {*STRANGE_PARTS, *family.without} - {*family.parts, *family.optional}
    strange = any(index.get(part) not in (None, [None, None]) for part in unused)
    fits = all(_class_of(index, part) in kinds_of(kind) for part, kind in family.parts.items())
    may = all(_class_of(index, part) in (None, kind) for part, kind in family.optional.items())
    return fits and may and not strange


def _lacking(index: Mapping[str, Any]) -> str:
    """What a pipeline of a class that we know by name lacks of its parts."""
    for family in diffusion_families():
        if index.get("_class_name") in family.pipelines:
            return ", ".join(
                f"`{part}` of class {' or '.join(kinds_of(kind))}"
                for part, kind in family.parts.items()
                if _class_of(index, part) not in kinds_of(kind)
            )
    return ""


def _class_of(index: Mapping[str, Any], part: str) -> Any:
    """The class of a part that model_index.json lists as ``[library, class]``."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def describe_source(source: Source) -> Description:
    """What a model's config files say.

    Raises:
        ValueError: the model is of no supported family, or a config file is missing.
    """
    family = family_of(source)
    where = "folder" if source.folder else source.location
    if isinstance(family, str):
        vision = source.vision_config()
        layers = vit_layers(vision, norm=family == "dinov2")
        size = source.crop_size(vision["image_size"])
        return Description(source.name, "ViT", size, layers, where)
    shape = family.shape(source)
    return Description(source.name, family.kind, shape.image_size, shape.layers, where)
