"""Where a model comes from, and what its config files say: no weights, no torch.

A folder or hub id is known by its ``model_index.json`` (diffusers pipelines) or its ``config.json``
(transformers models), so that every checkpoint of a supported family loads without being listed anywhere.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.backbones.specs import Layers, dit_layers, unet_layers, vae_stride, vit_layers

# What a model_index.json's class, or a config.json's model_type, is to us.
PIPELINES = {"StableDiffusionPipeline": "stable-diffusion", "DiTPipeline": "dit"}
MODEL_TYPES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
KINDS = {"stable-diffusion": "U-Net", "dit": "DiT", "clip": "ViT", "dinov2": "ViT"}
SUPPORTED = (
    "StableDiffusionPipeline (1.x and 2.x) and DiTPipeline folders, CLIP and DINOv2 models; "
    "SDXL, SD3, Flux and DeepFloyd-IF are not supported yet"
)
# What transformers assumes where a config.json is silent.
CLIP_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224}
DINOV2_DEFAULTS = CLIP_DEFAULTS | {"patch_size": 14}

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
    """

    name: str
    location: str
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The folder, unless it is a hub id."""
        return Path(self.location) if Path(self.location).is_dir() else None

    def json(self, path: str) -> dict[str, Any]:
        """A JSON file of the model.

        Raises:
            ValueError: it is missing, is no JSON, or the hub can't be reached.
        """
        found, reason = self._look_up(path)
        if found is None:
            raise ValueError(reason or f"{self.name} has no {path}: supported are {SUPPORTED}")
        return found

    def find_json(self, path: str) -> dict[str, Any] | None:
        """A JSON file of the model, or None where it can't be had.

        Raises:
            ValueError: it is no JSON.
        """
        return self._look_up(path)[0]

    def _look_up(self, path: str) -> tuple[dict[str, Any] | None, str]:
        """A JSON file, or None and why the hub didn't give it ("" where the model has no such file)."""
        folder, reason = self.folder, ""
        if folder:
            file = folder / path
        else:
            file, reason = _download(self.location, path, self.revision)
        if file is None or not file.is_file():
            return None, reason
        try:
            return json.loads(file.read_text(encoding="utf-8")), ""
        except ValueError as error:
            raise ValueError(f"{path} of {self.name} is not valid JSON: {error}") from error

    def family(self) -> str:
        """Which of our loaders takes it: one of ``KINDS``.

        Raises:
            ValueError: the model is of no supported family.
        """
        index = self.find_json("model_index.json")
        if index is not None:
            found, known = str(index.get("_class_name")), PIPELINES
        else:
            config, reason = self._look_up("config.json")
            if config is None:
                raise ValueError(
                    reason
                    or f"{self.name} holds neither model_index.json nor config.json: "
                    f"supported are {SUPPORTED}"
                )
            found = str(config.get("model_type") or config.get("_class_name"))
            known = MODEL_TYPES
        if found not in known:
            raise ValueError(f"{self.name} is a {found}: supported are {SUPPORTED}")
        return known[found]

    def vision_config(self) -> dict[str, Any]:
        """The config of a ViT; of a whole CLIP model, its image half."""
        config = self.json("config.json")
        if MODEL_TYPES.get(str(config.get("model_type"))) == "dinov2":
            return DINOV2_DEFAULTS | config
        return CLIP_DEFAULTS | config.get("vision_config", config)

    def describe(self) -> Description:
        """What the config files say.

        Raises:
            ValueError: the model is of no supported family, or a config file is missing.
        """
        family = self.family()
        if family == "stable-diffusion":
            unet, vae = self.json("unet/config.json"), self.json("vae/config.json")
            layers, size = unet_layers(unet, vae), _latent_side(unet) * vae_stride(vae)
        elif family == "dit":
            transformer, vae = self.json("transformer/config.json"), self.json("vae/config.json")
            layers, size = (
                dit_layers(transformer, vae),
                transformer["sample_size"] * vae_stride(vae),
            )
        else:
            vision = self.vision_config()
            layers = vit_layers(vision, norm=family == "dinov2")
            size = _crop(self.find_json("preprocessor_config.json") or {}, vision["image_size"])
        where = "folder" if self.folder else self.location
        return Description(self.name, KINDS[family], size, layers, where)


def _latent_side(unet: Mapping[str, Any]) -> int:
    side = unet["sample_size"]
    return side if isinstance(side, int) else min(side)


def _crop(processor: Mapping[str, Any], size: int) -> int:
    """The side a processor crops to; DINOv2's is 224 where its position embeddings are for 518."""
    crop = processor.get("crop_size") or size
    return crop if isinstance(crop, int) else crop.get("height", size)


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
