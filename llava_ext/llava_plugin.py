"""Revelio's towers inside LLaVA's own code (the package ``llava``): its training, its models, its tools.

    import llava_ext.llava_plugin
    llava_ext.llava_plugin.install()

or, for a script of LLaVA's as it is,

    python -m llava_ext.llava_plugin llava/train/train_mem.py --vision_tower revelio:sd-1.5/up_ft1@t25 ...
    deepspeed --module llava_ext.llava_plugin llava/train/train_mem.py --vision_tower ...

A tower is named ``revelio:BACKBONE/LAYER[@tT][:poolN | :convN[xWIDTH]]``; several are joined by ``+`` and
interleaved, as ``revelio:clip-vit-l-14/block22+revelio:sd-1.5/up_ft1@t25:conv256``. One tower whose tokens
are the grid's cells or averages has LLaVA's own projector. Of several, or of one with the paper's conv block,
each has a :class:`llava_ext.projector.Projector` (two layers: ``--mm_projector_type mlp2x_gelu``).

Pictures go through LLaVA as whole numbers from 0 to 255, which float16 and bfloat16 hold exactly, and bring
their name by content: grids are those of ``llava_ext``, whatever number format lies between.
"""

import re
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from math import isqrt, prod
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llava_ext.config import TowerConfig
from llava_ext.fusion import fuse, fused_length
from llava_ext.images import NAME_BYTES, image_id, join_pixels, split_pixels
from llava_ext.projector import Projector, build_tokens, token_raster
from llava_ext.towers import Tower, load_tower, plain_transforms
from revelio.backbones.layers import check_grid
from revelio.backbones.registry import describe_one
from revelio.distributed import own_device
from revelio.trust import printable

PREFIX = "revelio:"
NAME = re.compile(
    r"(?P<backbone>.+)/(?P<layer>[\w.-]+?)(?:@t(?P<timestep>\d+))?"
    r"(?::(?P<tokens>pool|conv)(?P<budget>\d+)(?:x(?P<width>\d+))?)?"
)
BUILDERS = (
    ("llava.model.multimodal_encoder.builder", "build_vision_tower"),
    ("llava.model.multimodal_projector.builder", "build_vision_projector"),
)
PROJECTOR_TYPE = "mlp2x_gelu"
WIDTH = TowerConfig("", "").width


def install() -> None:
    """Make LLaVA's builders take Revelio's towers; a second call changes nothing.

    Raises:
        ModuleNotFoundError: the package ``llava`` is not installed.
    """
    for (place, name), ours in zip(BUILDERS, (_build_tower, _build_projector), strict=True):
        theirs = vars(import_module(place))[name]
        if theirs.__module__ == __name__:
            continue
        patched = _patched(theirs, ours)
        # Its other modules have taken the function by name.
        for module in [each for key, each in sys.modules.items() if key.startswith("llava.")]:
            if vars(module).get(name) is theirs:
                setattr(module, name, patched)


def _patched(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    def build(config: Any, *arguments: Any, **settings: Any) -> Any:
        known = vars(config)
        name = known.get("mm_vision_tower") or known.get("vision_tower") or ""
        built = ours(str(name), known, **settings) if str(name).startswith(PREFIX) else None
        return theirs(config, *arguments, **settings) if built is None else built

    return build


def _build_tower(name: str, _: Any, *, delay_load: bool = False, **__: Any) -> "VisionTower":
    return VisionTower(name, delay_load=delay_load)


def _build_projector(name: str, config: Any, **_: Any) -> "TowerProjectors | None":
    """Projectors of our own where LLaVA's don't do."""
    configs = read_tower_names(name)
    if has_stock_projector(configs):
        return None
    if config.get("mm_projector_type", PROJECTOR_TYPE) != PROJECTOR_TYPE:
        raise ValueError(
            f"{printable(name)} has a projector of two layers a tower, not "
            f"`{printable(config['mm_projector_type'])}`: give mm_projector_type {PROJECTOR_TYPE}"
        )
    shapes = map(tower_shape, configs)
    width = config["hidden_size"] if "hidden_size" in config else config["d_model"]
    return TowerProjectors(
        Projector(one, *shape, width) for one, shape in zip(configs, shapes, strict=True)
    )


def has_stock_projector(configs: Sequence[TowerConfig]) -> bool:
    """Whether LLaVA's own projector takes the towers' tokens."""
    return (
        len(configs) == 1 and configs[0].tokens in ("flatten", "pool") and not configs[0].normalize
    )


def read_tower_names(text: str) -> tuple[TowerConfig, ...]:
    """The towers that ``revelio:...+revelio:...`` names; their settings are the defaults.

    Raises:
        KeyError: an unknown backbone or layer.
        ValueError: it is no such name.
    """
    return tuple(map(_tower_config, text.removeprefix(PREFIX).split(f"+{PREFIX}")))


def _tower_config(name: str) -> TowerConfig:
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{PREFIX}{printable(name)} names no tower: give {PREFIX}BACKBONE/LAYER, and @tT for a diffusion "
            f"model's timestep, as in {PREFIX}sd-1.5/up_ft1@t25"
        )
    found = match.groupdict()
    numbers = {name: int(found[name]) for name in ("timestep", "budget", "width") if found[name]}
    named: dict[str, Any] = {"tokens": found["tokens"] or "flatten", **numbers}
    config = TowerConfig(found["backbone"], found["layer"], **named)
    return config if found["tokens"] else replace(config, budget=prod(tower_shape(config)[1]))


def tower_names(configs: Sequence[TowerConfig]) -> str:
    """The towers' name in LLaVA; the opposite of :func:`read_tower_names`.

    Raises:
        ValueError: a tower has a setting that a name doesn't hold.
    """
    names = []
    for config in configs:
        step = "" if config.timestep is None else f"@t{config.timestep}"
        form = "" if config.tokens == "flatten" else f":{config.tokens}{config.budget}"
        form += f"x{config.width}" if config.tokens == "conv" and config.width != WIDTH else ""
        names.append(f"{PREFIX}{config.backbone}/{config.layer}{step}{form}")
        if _tower_config(names[-1].removeprefix(PREFIX)) != config:
            raise ValueError(
                f"tower {config.backbone} {config.layer} has a setting beside layer, timestep and tokens, "
                "which a vision tower's name in LLaVA doesn't hold"
            )
    return "+".join(names)


def tower_shape(config: TowerConfig) -> tuple[int, tuple[int, int]]:
    """Channels of a tower's grid, and its height and width, from the backbone's config files alone.

    Raises:
        KeyError: an unknown backbone or layer.
    """
    about = describe_one(config.backbone)
    spec = check_grid(about.layers, config.layer, about.name)
    side = about.image_size // spec.stride
    return spec.channels, (side, side)


class TowerProjectors(nn.ModuleList):
    """A projector a tower, and their tokens interleaved."""

    def forward(self, grids: Sequence[Tensor]) -> Tensor:
        """Tokens (i T d) of the towers' grids."""
        pairs = zip(self, grids, strict=True)
        return fuse("interleave", [projector(each) for projector, each in pairs])


class PictureProcessor:
    """What LLaVA asks of an image processor.

    Attributes:
        crop_size: height and width of what :meth:`preprocess` gives.
        size: the side of the square that the largest tower sees.
        image_mean: what LLaVA pads pictures with.
    """

    def __init__(self, transforms: Sequence[dict[str, Any]]) -> None:
        self.transforms = transforms
        side = max(each["size"] for each in transforms)
        numbers = 3 * sum(each["size"] ** 2 for each in transforms) + NAME_BYTES
        self.crop_size = {"height": side, "width": -(-numbers // (3 * side))}
        self.size = {"shortest_edge": side}
        self.image_mean = list(transforms[0]["mean"])

    def preprocess(self, images: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """``pixel_values`` (i 3 h w): what every tower sees of each picture, and its name, as they come."""
        pictures = [images] if isinstance(images, Image.Image) else images
        return {"pixel_values": torch.stack([self._numbers(each) for each in pictures])}

    __call__ = preprocess

    def _numbers(self, picture: Image.Image) -> Tensor:
        height, width = self.crop_size["height"], self.crop_size["width"]
        rgb = picture.convert("RGB")
        rgb.info = {}  # LLaVA turns no picture by its notes, so it is named as it is
        name = torch.tensor(list(bytes.fromhex(image_id(rgb))), dtype=torch.uint8)
        known = torch.cat([join_pixels(rgb, self.transforms), name])
        room = torch.zeros(3 * height * width - len(known), dtype=torch.uint8)
        return torch.cat([known, room]).view(3, height, width).float()


class VisionTower(nn.Module):
    """Frozen towers as LLaVA's code knows one; they are no part of the module, nor of its state.

    Attributes:
        vision_tower_name: as it was asked for.
        is_loaded: whether :meth:`load_model` was called.
        hidden_size: channels of the tokens; of several towers, of all together.
        num_patches: tokens an image.
        config: has ``hidden_size`` and ``image_size``.
    """

    image_processor: PictureProcessor

    def __init__(self, name: str, *, delay_load: bool = False) -> None:
        """The towers of a name.

        Args:
            name: ``revelio:BACKBONE/LAYER...``, see the module.
            delay_load: load no weights until :meth:`load_model`.

        Raises:
            KeyError: an unknown backbone or layer.
            ValueError: it is no such name, or a number of tokens that can't be had.
        """
        super().__init__()
        self.vision_tower_name, self.is_loaded = name, False
        self.configs = read_tower_names(name)
        self.shapes = [tower_shape(each) for each in self.configs]
        rasters = [
            token_raster(config, grid)
            for config, (_, grid) in zip(self.configs, self.shapes, strict=True)
        ]
        self.num_patches = fused_length("interleave", [prod(raster) for raster in rasters])
        self.hidden_size = sum(channels for channels, _ in self.shapes)
        self.towers: tuple[Tower, ...] = ()
        # Follows the model from device to device and from format to format; LLaVA builds on no device at all.
        self._place = torch.empty(0, device="cpu", dtype=torch.float32)
        if not delay_load:
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Load the towers: on the device that is named, else on this process's own."""
        if self.is_loaded:
            return
        named = isinstance(device_map, str) and device_map != "auto"
        device = device_map if named else own_device()
        # The name may come from a saved model's config, which must import nothing.
        self.towers = tuple(load_tower(each, device, imports=False) for each in self.configs)
        self.image_processor = PictureProcessor(plain_transforms(self.towers))
        self.is_loaded = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VisionTower":
        self._place = fn(self._place)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, images: Any) -> Any:
        """Tokens (i t c) of a processor's pictures (i 3 h w); several towers' grids, for their projectors."""
        if isinstance(images, list):
            return [self(each[None]) for each in images]
        numbers = images.round().to(torch.uint8).flatten(1)
        transforms = self.image_processor.transforms
        length = 3 * sum(each["size"] ** 2 for each in transforms)
        names = [bytes(row).hex() for row in numbers[:, length : length + NAME_BYTES].tolist()]
        pixels = split_pixels(numbers[:, :length], transforms)
        pairs = zip(self.towers, pixels, strict=True)
        form = images.dtype if images.is_floating_point() else self.dtype
        grids = [tower.grids(each, names).to(images.device, form) for tower, each in pairs]
        if not has_stock_projector(self.configs):
            return grids
        return build_tokens(self.configs[0], *self.shapes[0])[0](grids[0])

    @property
    def dtype(self) -> torch.dtype:
        """The number format that LLaVA gave the tower; the backbones keep their own."""
        return self._place.dtype

    @property
    def device(self) -> torch.device:
        """Where LLaVA put the tower."""
        return self._place.device

    @property
    def dummy_feature(self) -> Tensor:
        """One token of zeros."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def num_patches_per_side(self) -> int:
        """Rows of tokens, where they stand in a square.

        Raises:
            ValueError: several towers' tokens stand in none.
        """
        side = isqrt(self.num_patches)
        if side * side != self.num_patches:
            raise ValueError(f"{self.num_patches} interleaved tokens stand in no square")
        return side

    @property
    def config(self) -> SimpleNamespace:
        """What LLaVA reads of a vision model's config."""
        size = max(describe_one(each.backbone).image_size for each in self.configs)
        return SimpleNamespace(hidden_size=self.hidden_size, image_size=size)


if __name__ == "__main__":
    # The module by its own name: what is patched must be known as its own.
    import_module("llava_ext.llava_plugin").install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
