"""Where a model comes from, and what its config files say: no weights, no torch.

A folder or hub id is known by its ``model_index.json`` (diffusers pipelines) or its ``config.json``
(transformers models), so that every checkpoint of a supported family loads without being listed anywhere.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.backbones.specs import Layers, dit_layers, unet_layers, vae_stride, vit_layers
from revelio.trust import MIB, printable, read_object

# The parts that make a pipeline of a family, whatever its class is called: model_index.json lists them.
PIPELINES = {
    "stable-diffusion": {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    },
    "dit": {"transformer": "DiTTransformer2DModel", "vae": "AutoencoderKL"},
}
# Parts that steer the denoiser in ways we don't compute (SDXL, SD3, unCLIP, ...).
STRANGE_PARTS = ("text_encoder_2", "text_encoder_3", "prior", "image_encoder", "image_normalizer")
# Settings of a U-Net that want inputs beside latents, timestep and text.
MORE_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
)
MODEL_TYPES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
KINDS = {"stable-diffusion": "U-Net", "dit": "DiT", "clip": "ViT", "dinov2": "ViT"}
SUPPORTED = (
    "Stable Diffusion (1.x and 2.x) and DiT pipelines, CLIP and DINOv2 models; "
    "SDXL, SD3, Flux and DeepFloyd-IF are not supported yet"
)
# What transformers assumes where a config.json is silent.
CLIP_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224}
DINOV2_DEFAULTS = CLIP_DEFAULTS | {"patch_size": 14}

# What each part's config must say: lists of numbers, or numbers.
NEEDED: dict[str, dict[str, type]] = {
    "UNet2DConditionModel": {"block_out_channels": list, "in_channels": int},
    "AutoencoderKL": {"block_out_channels": list, "latent_channels": int},
    "DiTTransformer2DModel": {
        "num_attention_heads": int,
        "attention_head_dim": int,
        "num_layers": int,
        "patch_size": int,
        "sample_size": int,
        "num_embeds_ada_norm": int,
    },
    "vision": dict.fromkeys(CLIP_DEFAULTS, int),
}
# Beyond these no model is, and building one would take all memory before its weights are looked at.
MOST = 10**9
MOST_LAYERS = 1000
MOST_SIDE = 16384
NORMALISATION = {"image_mean", "image_std"}
CONFIG_LIMIT = 16 * MIB

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Description:
    """One known model, as ``revelio backbones`` lists it.

    Attributes:
        name: what to call it.
        kind: ``U-Net``, ``DiT`` or ``ViT``; anything for a model of a user's own.
        image_size: the side of the square it was trained on, in pixels; 0 where unknown.
        layers: its layers, in order of depth.
        source: a hub id, ``shipped``, ``folder`` or ``registered``.
        summary: one line.
    """

    name: str
    kind: str
    image_size: int
    layers: Layers
    source: str
    summary: str = ""


@dataclass(frozen=True)
class Source:
    """A model's folder or hub id.

    Attributes:
        name: what results call it; never an absolute path.
        location: the folder or the hub id.
        revision: of a hub id.
        unet: a U-Net's folder or file, in place of the pipeline's own.
    """

    name: str
    location: str
    revision: str | None = None
    unet: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The folder, unless it is a hub id."""
        return Path(self.location) if Path(self.location).is_dir() else None

    def file(self, path: str) -> Path | None:
        """A file of the model, or None where it has none of that name.

        Raises:
            ValueError: the hub can't be reached.
        """
        found, reason = self._look_up(path)
        if reason:
            raise ValueError(reason)
        return found

    def json(self, path: str) -> dict[str, Any]:
        """A JSON file of the model.

        Raises:
            ValueError: it is missing, is no JSON object, or the hub can't be reached.
        """
        file = self.file(path)
        if file is None:
            raise ValueError(f"{self.name} has no {path}: supported are {SUPPORTED}")
        return self._read(file, path)

    def find_json(self, path: str) -> dict[str, Any] | None:
        """A JSON file of the model, or None where it can't be had.

        Raises:
            ValueError: it is no JSON object.
        """
        file, _ = self._look_up(path)
        return None if file is None else self._read(file, path)

    def _read(self, file: Path, path: str) -> dict[str, Any]:
        try:
            return read_object(file, limit=CONFIG_LIMIT)
        except ValueError as error:
            reason = str(error).removeprefix(f"{printable(file)} ")
            raise ValueError(f"{path} of {self.name} {reason}") from error

    def _look_up(self, path: str) -> tuple[Path | None, str]:
        """A file, or None and why the hub didn't give it ("" where the model has no such file)."""
        if self.unet is not None and self.unet.is_dir() and path.startswith("unet/"):
            file = self.unet / path.removeprefix("unet/")
        elif self.folder:
            file = self.folder / path
        else:
            return _download(self.location, path, self.revision)
        return (file if file.is_file() else None), ""

    def part_config(self, part: str, kind: str) -> dict[str, Any]:
        """The config of a diffusers part.

        Raises:
            ValueError: it is missing, of another class than ``kind``, or lacks what tells its layers.
        """
        path = f"{part}/config.json"
        config = self.json(path)
        if config.get("_class_name") != kind:
            found = printable(config.get("_class_name"))
            raise ValueError(f"{path} of {self.name} is of a {found}, not of a {kind}")
        self.check(path, config, NEEDED[kind])
        for name in MORE_INPUTS:
            if config.get(name) is not None:
                raise ValueError(
                    f"{path} of {self.name} sets `{name}`, for inputs beside image, timestep and text: "
                    f"supported are {SUPPORTED}"
                )
        return config

    def check(self, path: str, config: Mapping[str, Any], needed: Mapping[str, type]) -> None:
        """Compare a config with what it must hold.

        Raises:
            ValueError: it lacks what tells the layers, or a number is beyond any model's size.
        """
        for name, kind in needed.items():
            value = config.get(name)
            numbers = value if kind is list and isinstance(value, list) else [value]
            if not numbers or any(type(number) is not int or number < 1 for number in numbers):
                what = "a list of whole numbers" if kind is list else "a whole number"
                raise ValueError(
                    f"{path} of {self.name} has {name} = {printable(repr(value))[:80]}: it must be {what} "
                    "of at least 1"
                )
        for name, value in config.items():
            if isinstance(value, Mapping):
                self.check(path, value, {})
                continue
            most = MOST_LAYERS if "layers" in name or "experts" in name else MOST
            for number in value if isinstance(value, list) else [value]:
                # The base of rotary embeddings sizes nothing, and goes beyond 10^9.
                if "theta" in name or not isinstance(number, int | float):
                    continue
                if not abs(number) <= most:
                    raise ValueError(
                        f"{path} of {self.name} has {name} = {number}: no model is so large"
                    )

    def family(self) -> str:
        """Which of our loaders takes it: one of ``KINDS``.

        Raises:
            ValueError: the model is of no supported family.
        """
        index = self.find_json("model_index.json")
        if index is not None:
            for family, parts in PIPELINES.items():
                strange = any(index.get(part) not in (None, [None, None]) for part in STRANGE_PARTS)
                if not strange and all(_class_of(index, p) == kind for p, kind in parts.items()):
                    return family
            found = index.get("_class_name")
            lacking = _lacking(index)
            if lacking:
                raise ValueError(f"model_index.json of {self.name} lists no {lacking}")
        else:
            file, reason = self._look_up("config.json")
            if file is None:
                raise ValueError(
                    reason
                    or f"{self.name} holds neither model_index.json nor config.json: "
                    f"supported are {SUPPORTED}"
                )
            config = self._read(file, "config.json")
            found = config.get("model_type") or config.get("_class_name")
            if isinstance(found, str) and found in MODEL_TYPES:
                return MODEL_TYPES[found]
        raise ValueError(f"{self.name} is a {printable(found)}: supported are {SUPPORTED}")

    def vision_config(self) -> dict[str, Any]:
        """The config of a ViT; of a whole CLIP model, its image half.

        Raises:
            ValueError: it is missing, or a size is no number.
        """
        config = self.json("config.json")
        if MODEL_TYPES.get(str(config.get("model_type"))) == "dinov2":
            found = DINOV2_DEFAULTS | config
        else:
            inner = config.get("vision_config", config)
            found = CLIP_DEFAULTS | (inner if isinstance(inner, dict) else {})
        self.check("config.json", found, NEEDED["vision"])
        return found

    def processor(self) -> dict[str, Any]:
        """How a ViT's pictures are brought to size and normalised.

        Raises:
            ValueError: no file says it; guessing would give other activations without a word.
        """
        found = self.find_json("preprocessor_config.json")
        if found is None:
            found = (self.find_json("processor_config.json") or {}).get("image_processor")
        found = found if isinstance(found, dict) else {}
        if found.get("do_normalize", True) is not True or not found.keys() >= NORMALISATION:
            raise ValueError(
                f"{self.name} has no preprocessor_config.json with image_mean and image_std, which "
                "says how pictures are brought to size and normalised: take it from where the model came from"
            )
        return found

    def unet_config(self) -> dict[str, Any]:
        """The config of the U-Net.

        Raises:
            ValueError: see :meth:`part_config`; or it says no image size.
        """
        config = self.part_config("unet", "UNet2DConditionModel")
        side = config.get("sample_size")
        sides = side if isinstance(side, list) else [side]
        if not sides or any(type(each) is not int or each < 1 for each in sides):
            raise ValueError(f"unet/config.json of {self.name} has no `sample_size`")
        return config

    def _crop(self, size: int) -> int:
        """The side its processor crops to; DINOv2's is 224 where its position embeddings are for 518."""
        crop = self.processor().get("crop_size") or size
        crop = crop.get("height", size) if isinstance(crop, dict) else crop
        if type(crop) is not int or not 1 <= crop <= MOST_SIDE:
            raise ValueError(f"the preprocessor config of {self.name} has crop_size {crop!r}")
        return crop

    def describe(self) -> Description:
        """What the config files say.

        Raises:
            ValueError: the model is of no supported family, or a config file is missing.
        """
        family = self.family()
        if family == "stable-diffusion":
            unet, vae = self.unet_config(), self.part_config("vae", "AutoencoderKL")
            layers, size = unet_layers(unet, vae), _latent_side(unet) * vae_stride(vae)
        elif family == "dit":
            transformer = self.part_config("transformer", "DiTTransformer2DModel")
            vae = self.part_config("vae", "AutoencoderKL")
            layers = dit_layers(transformer, vae)
            size = transformer["sample_size"] * vae_stride(vae)
        else:
            vision = self.vision_config()
            layers = vit_layers(vision, norm=family == "dinov2")
            size = self._crop(vision["image_size"])
        where = "folder" if self.folder else self.location
        return Description(self.name, KINDS[family], size, layers, where)


def _lacking(index: Mapping[str, Any]) -> str:
    """What a pipeline of a class that we know by name lacks of its parts."""
    names = {"StableDiffusionPipeline": "stable-diffusion", "DiTPipeline": "dit"}
    parts = PIPELINES.get(names.get(str(index.get("_class_name")), ""), {})
    odd = [
        f"`{part}` of class {kind}"
        for part, kind in parts.items()
        if _class_of(index, part) != kind
    ]
    return ", ".join(odd)


def _class_of(index: Mapping[str, Any], part: str) -> Any:
    """The class of a part that model_index.json lists as ``[library, class]``."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _latent_side(unet: Mapping[str, Any]) -> int:
    side = unet["sample_size"]
    return side if isinstance(side, int) else min(side)


def _download(hub_id: str, path: str, revision: str | None) -> tuple[Path | None, str]:
    """One small file from the hub or its cache, or None and why the hub can't give it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(hub_id, path, revision=revision)), ""
    except RemoteEntryNotFoundError:
        return None, ""
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        return None, (
            f"{hub_id} is no folder here and can't be had from the hub ({reason}): give the path "
            "of a downloaded folder, or a name that `revelio backbones` lists"
        )
