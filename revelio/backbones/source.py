"""Where a model comes from, and what its config files say: no weights, no torch.

A folder or hub id is known by its ``model_index.json`` (diffusers pipelines) or its ``config.json``
(transformers models), so that every checkpoint of a supported family loads without being listed anywhere.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.backbones.layers import Layers
from revelio.trust import MIB, printable, read_object

# What a pipeline's denoiser is called.
DENOISERS = ("unet", "transformer")
# Settings of a U-Net that want inputs beside latents, timestep and text.
MORE_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
)
# What transformers assumes where a config.json is silent.
CLIP_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224}
DINOV2_DEFAULTS = CLIP_DEFAULTS | {"patch_size": 14}

# What each part's config must say: lists of numbers, or numbers.
NEEDED_OF_VAE: dict[str, type] = {"block_out_channels": list, "latent_channels": int}
NEEDED_OF_VIT: dict[str, type] = dict.fromkeys(CLIP_DEFAULTS, int)
# Beyond these no model is, and building one would take all memory before its weights are looked at.
MOST = 10**9
MOST_LAYERS = 1000
MOST_SIDE = 16384
NORMALISATION = {"image_mean", "image_std"}
CONFIG_LIMIT = 16 * MIB


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
        note: what to know before it is loaded, such as that it must be asked for.
    """

    name: str
    kind: str
    image_size: int
    layers: Layers
    source: str
    summary: str = ""
    note: str = ""


@dataclass(frozen=True)
class Source:
    """A model's folder or hub id.

    Attributes:
        name: what results call it; never an absolute path.
        location: the folder or the hub id.
        revision: of a hub id.
        denoiser: the folder or file of a U-Net or transformer, in place of the pipeline's own.
    """

    name: str
    location: str
    revision: str | None = None
    denoiser: Path | None = None

    @property
    def folder(self) -> Path | None:
        """The folder, unless it is a hub id."""
        return Path(self.location) if Path(self.location).is_dir() else None

    def file(self, path: str) -> Path | None:
        """A file of the model, or None where it has none of that name.

        Raises:
            ValueError: the hub can't be reached.
        """
        found, reason = self.look_up(path)
        if reason:
            raise ValueError(reason)
        return found

    def json(self, path: str, *, infinite: bool = False) -> dict[str, Any]:
        """A JSON file of the model; ``infinite`` as diffusers writes the configs of some schedulers.

        Raises:
            ValueError: it is missing, is no JSON object, or the hub can't be reached.
        """
        file = self.file(path)
        if file is None:
            raise ValueError(f"{self.name} has no {path}, which models of its family have")
        return self.read_file(file, path, infinite=infinite)

    def find_json(self, path: str) -> dict[str, Any] | None:
        """A JSON file of the model, or None where it can't be had.

        Raises:
            ValueError: it is no JSON object.
        """
        file, _ = self.look_up(path)
        return None if file is None else self.read_file(file, path)

    def read_file(self, file: Path, path: str, *, infinite: bool = False) -> dict[str, Any]:
        """The JSON object of a file that :meth:`look_up` gave.

        Raises:
            ValueError: it is no JSON object.
        """
        try:
            return read_object(file, limit=CONFIG_LIMIT, infinite=infinite)
        except ValueError as error:
            reason = str(error).removeprefix(f"{printable(file)} ")
            raise ValueError(f"{path} of {self.name} {reason}") from error

    def look_up(self, path: str) -> tuple[Path | None, str]:
        """A file, or None and why the hub didn't give it ("" where the model has no such file)."""
        part, _, rest = path.partition("/")
        if part in DENOISERS and self.denoiser is not None and self.denoiser.is_dir():
            file = self.denoiser / rest
        elif self.folder:
            file = self.folder / path
        else:
            return _download(self.location, path, self.revision)
        return (file if file.is_file() else None), ""

    def part_config(
        self,
        part: str,
        kind: str | tuple[str, ...],
        needed: Mapping[str, type],
        refused: Collection[str] = MORE_INPUTS,
    ) -> dict[str, Any]:
        """The config of a diffusers part.

        Args:
            part: its subfolder.
            kind: its class, or those that it may be of.
            needed: what it must say; see :meth:`check`.
            refused: settings that it must not have: they stand for inputs that the family does not give.

        Raises:
            ValueError: it is missing, of another class than ``kind``, or lacks what tells its layers.
        """
        path = f"{part}/config.json"
        config = self.json(path)
        if config.get("_class_name") not in kinds_of(kind):
            found = printable(config.get("_class_name"))
            known = " or ".join(kinds_of(kind))
            raise ValueError(f"{path} of {self.name} is of a {found}, not of a {known}")
        self.check(path, config, needed)
        for name in refused:
            if config.get(name) is not None:
                raise ValueError(
                    f"{path} of {self.name} sets `{name}`, for inputs beside image, timestep and prompt: "
                    "models that take them are not supported"
                )
        return config

    def vae_config(self) -> dict[str, Any]:
        """The config of the VAE of a latent model.

        Raises:
            ValueError: see :meth:`part_config`.
        """
        return self.part_config("vae", "AutoencoderKL", NEEDED_OF_VAE)

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
                if name.endswith("_token_id") and type(number) not in (int, type(None)):
                    raise ValueError(
                        f"{path} of {self.name} has {name} = {printable(repr(value))[:80]}: give a number"
                    )
                # The base of rotary embeddings sizes nothing, and goes beyond 10^9.
                if "theta" in name or not isinstance(number, int | float):
                    continue
                if not abs(number) <= most:
                    raise ValueError(
                        f"{path} of {self.name} has {name} = {number}: no model is so large"
                    )

    def vision_config(self) -> dict[str, Any]:
        """The config of a ViT; of a whole CLIP model, its image half.

        Raises:
            ValueError: it is missing, or a size is no number.
        """
        config = self.json("config.json")
        if str(config.get("model_type")).startswith("dinov2"):
            found = DINOV2_DEFAULTS | config
        else:
            inner = config.get("vision_config", config)
            found = CLIP_DEFAULTS | (inner if isinstance(inner, dict) else {})
        self.check("config.json", found, NEEDED_OF_VIT)
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

    def check_sides(self, path: str, config: Mapping[str, Any]) -> None:
        """Raise a ValueError unless the config says an image size: ``sample_size``, one or two numbers."""
        side = config.get("sample_size")
        sides = side if isinstance(side, list) else [side]
        if not sides or any(type(each) is not int or each < 1 for each in sides):
            raise ValueError(f"{path} of {self.name} has no `sample_size`")

    def crop_size(self, size: int) -> int:
        """The side its processor gives; DINOv2's is 224 where its position embeddings are for 518.

        Raises:
            ValueError: it is no number, or no square.
        """
        processor = self.processor()
        cut = processor.get("do_center_crop", True)
        entry = (processor.get("crop_size") if cut else None) or processor.get("size") or size
        return check_side("crop_size", entry, self.name)


def check_side(name: str, entry: object, source: str) -> int:
    """The side of a square in a preprocessor's config: a number, ``{shortest_edge}``, ``{height, width}``.

    Raises:
        ValueError: it is no number, or no square.
    """
    sides = list(entry.values()) if isinstance(entry, dict) else [entry]
    side = sides[0] if sides else None
    if type(side) is not int or sides.count(side) < len(sides) or not 1 <= side <= MOST_SIDE:
        raise ValueError(
            f"the preprocessor config of {source} has {name} {printable(repr(entry))[:80]}: the side of a "
            "square is needed"
        )
    return side


def kinds_of(kind: str | tuple[str, ...]) -> tuple[str, ...]:
    """The classes that a part may be of."""
    return (kind,) if isinstance(kind, str) else kind


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
