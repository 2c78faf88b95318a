"""Vision towers: pictures to grids by frozen models that stay outside the trained model.

    tower = load_tower(TowerConfig("sd-1.5", "up_ft1", timestep=25, tokens="conv"))
    grids = tower.grids(torch.stack([tower.pixels(image)]), [image_id(image)])    # (1 1280 32 32)

A tower is no ``nn.Module``: it is in no optimiser, no ZeRO partition and no checkpoint (SPEC L7). Every
tower has its own image processor (the released DINOv2 was fed CLIP's pixels, SPEC L15), and a diffusion
tower's noise is keyed by (seed, image id, timestep, draw), where the id is the image's content.

A backbone of your own (:mod:`revelio.backbones.registry`) is a tower already; anything else that yields
grids is one file and one :func:`register`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from llava_ext.config import QUESTION, Aspect, ModelConfig, TowerConfig
from llava_ext.images import image_id as image_id
from llava_ext.images import pad_to_square, transform_from
from revelio.backbones.base import Backbone, check_request
from revelio.backbones.layers import check_grid
from revelio.backbones.registry import load_backbone
from revelio.backbones.weights_hash import weight_bytes
from revelio.backbones.weights_hash import weights_hash as weights_hash
from revelio.config import to_plain
from revelio.data.picture import as_rgb
from revelio.data.transforms import SquareTransform, crop_of, thumbnail

GREY = (0.5, 0.5, 0.5)
P = ParamSpec("P")
T = TypeVar("T")


class Tower(Protocol):
    """What turns pictures into grids.

    Attributes:
        config: as it was asked for.
        channels: of its grid.
        grid: the grid's height and width.
    """

    config: TowerConfig
    channels: int
    grid: tuple[int, int]

    def pixels(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """A picture by the tower's own image processor."""
        ...

    def grids(
        self, pixels: Float[Tensor, "i 3 h w"], ids: Sequence[str]
    ) -> Float[Tensor, "i c h w"]:
        """The layer's grids in float32, on the tower's device; ``ids`` are :func:`image_id`'s."""
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that tell this tower's grids from any other's: settings and a hash of weights."""
        ...


Factory = Callable[[TowerConfig, str, Aspect], Tower]

_registered: dict[str, Factory] = {}


def _own_format(method: Callable[P, T]) -> Callable[P, T]:
    """Compute in the tower's own number format, whatever the model around it is trained in."""

    @wraps(method)
    def compute(*arguments: P.args, **settings: P.kwargs) -> T:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return method(*arguments, **settings)

    return compute


class BackboneTower:
    """A Revelio backbone as a tower; make one with :func:`load_tower`."""

    def __init__(self, config: TowerConfig, backbone: Backbone, aspect: Aspect) -> None:
        self.layers = config.layer.split("+")
        self.timesteps = config.timesteps or (config.timestep,)
        specs = [check_grid(backbone.layers, layer, backbone.name) for layer in self.layers]
        height, width = backbone.transform(Image.new("RGB", (8, 8))).shape[-2:]
        self.config = config
        self.channels = sum(spec.channels for spec in specs) * len(self.timesteps)
        self.grid = (height // specs[0].stride, width // specs[0].stride)
        self.backbone = backbone
        self.aspect: Aspect = aspect
        self._weights = ""

    def pixels(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """The picture cropped, or padded with the mean colour of the tower's own normalisation."""
        return self.backbone.transform(_whole(image, self.backbone.transform, self.aspect))

    def grids(
        self,
        pixels: Float[Tensor, "i 3 h w"],
        ids: Sequence[str],
        questions: Sequence[str] | None = None,
    ) -> Float[Tensor, "i c h w"]:
        """See :meth:`Tower.grids`; no images give an empty tensor and run nothing.

        Raises:
            ValueError: the prompt is the question, and there is none.
        """
        if not len(pixels):
            return torch.empty(0, self.channels, *self.grid)
        return self.grids_of(self.encode(pixels), ids, questions)

    @_own_format
    def encode(self, pixels: Float[Tensor, "i 3 h w"]) -> Float[Tensor, "i e y x"]:
        """What the pass starts from: a VAE's latents in float16, else the pixels."""
        return self.backbone.encode(pixels)

    @_own_format
    def grids_of(
        self,
        encoded: Float[Tensor, "i e y x"],
        ids: Sequence[str],
        questions: Sequence[str] | None = None,
    ) -> Float[Tensor, "i c h w"]:
        """:meth:`grids` of what :meth:`encode` gave."""
        prompts = self._prompts(len(encoded), questions)
        found = []
        for timestep in self.timesteps:
            activations = self.backbone.activations(
                encoded,
                ids,
                self.layers,
                timestep=timestep,
                prompts=prompts,
                seed=self.config.seed,
                draw=self.config.draw,
            )
            found += [self._fitted(activations[layer]) for layer in self.layers]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def _prompts(self, images: int, questions: Sequence[str] | None) -> Sequence[str] | None:
        prompt = self.config.prompt
        if prompt != QUESTION:
            return [prompt] * images if prompt else None
        if questions is None:
            raise ValueError(
                f"tower {self.config.backbone} {self.config.layer} is prompted by the question, which is not "
                "known here: give all that one call of the processor gives (one saved before it knew "
                "questions is made anew by `RevelioLlavaProcessor.of(model, processor.tokenizer)`)"
            )
        return questions

    def _fitted(self, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i c y x"]:
        """A layer on the first one's grid: averaged, or its cells repeated."""
        same = tuple(grids.shape[-2:]) == self.grid
        return grids if same else interpolate(grids, self.grid, mode="area")

    def identity(self) -> dict[str, Any]:
        """The tower's settings, its processor, and a hash of its weights, taken once."""
        self._weights = self._weights or weights_hash(self.backbone)
        grid_settings = to_plain(self.config)
        # How a grid becomes tokens is the projector's business: one cache serves all ways.
        for name in ("tokens", "budget", "width", "normalize"):
            del grid_settings[name]
        if not self.config.timesteps:  # caches of before there was the setting stay valid
            del grid_settings["timesteps"]
        return {
            **grid_settings,
            "aspect": self.aspect,
            "channels": self.channels,
            "grid": list(self.grid),
            "transform": repr(self.backbone.transform)
            if isinstance(self.backbone.transform, SquareTransform)
            else type(self.backbone.transform).__name__,
            "weights": self._weights,
        }


def look(
    tower: Tower,
    pixels: Float[Tensor, "i 3 h w"],
    ids: Sequence[str],
    questions: Sequence[str] | None = None,
) -> Float[Tensor, "i c h w"]:
    """A tower's grids; of one whose prompt is the question, with what is asked about each picture."""
    if tower.config.prompt == QUESTION:
        return cast(BackboneTower, tower).grids(pixels, ids, questions)
    return tower.grids(pixels, ids)


def tower_bytes(tower: Tower) -> int:
    """Bytes of a tower's weights: of one that is run on what is kept of pictures, too."""
    held = getattr(tower, "tower", tower)
    return weight_bytes(getattr(held, "backbone", held))


def load_tower(
    config: TowerConfig, device: str = "auto", aspect: Aspect = "crop", *, imports: bool = True
) -> Tower:
    """Load a tower, cut after its layer.

    Args:
        config: which backbone, layer, timestep, ...
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        aspect: ``crop`` or ``pad``; one for all towers of a model.
        imports: whether a backbone named ``module:function`` may be imported; not for a saved model's config.

    Raises:
        KeyError: an unknown backbone or layer; the message lists the known ones.
        ValueError: a setting the backbone can't take.
    """
    if config.backbone in _registered:
        return _registered[config.backbone](config, device, aspect)
    backbone = load_backbone(
        config.backbone,
        layers=config.layer.split("+"),
        revision=config.revision,
        image_size=config.image_size,
        dtype=config.dtype,
        device=device,
        imports=imports,
    )
    for timestep in config.timesteps or (config.timestep,):
        check_request(backbone, timestep, [config.prompt] if config.prompt else [])
    return BackboneTower(config, backbone, aspect)


def load_towers(
    config: ModelConfig,
    device: str = "auto",
    allow: Collection[str] | None = None,
    transforms: Sequence[Mapping[str, Any]] = (),
) -> tuple[Tower, ...]:
    """All towers of a model, in order; towers of one config share one.

    Args:
        config: of the model.
        device: where they run.
        allow: backbones named ``module:function`` that may be imported; None for all, which is right only
            where the user wrote the config.
        transforms: a saved model's, which it was trained with; none: what the backbones' own files say now.

    Raises:
        KeyError: an unknown backbone or layer.
        ValueError: a setting a backbone can't take, or one that may not be imported.
    """
    loaded: dict[TowerConfig, Any] = {}
    for each in dict.fromkeys(config.towers):
        imports = allow is None or each.backbone in allow
        loaded[each] = load_tower(each, device, config.aspect, imports=imports)
    if transforms:
        for each, entry in zip(config.towers, transforms, strict=True):
            loaded[each].backbone.transform = transform_from(entry)
    return tuple(loaded[each] for each in config.towers)


def register(name: str, factory: Factory) -> None:
    """Make a tower of your own known by ``name``, to be used as ``backbone`` in a config.

    Args:
        name: what configs call it.
        factory: takes the config, the device's name and the aspect, and gives a :class:`Tower`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _registered:
        raise ValueError(f"a tower {name!r} is registered already: choose another name")
    _registered[name] = factory


def seen_square(tower: Tower, image: Image.Image, aspect: Aspect, most: int) -> Image.Image:
    """The part of a picture that a tower's grid lies over, to be looked at.

    Args:
        tower: of whose image processing only the geometry counts; the middle square where it isn't known.
        image: of any size.
        aspect: the model's.
        most: pixels a side that are wanted; the picture is not enlarged to get them.
    """
    transform = getattr(getattr(tower, "backbone", None), "transform", None)
    return thumbnail(_whole(image, transform, aspect), most, crop_of(transform))


def plain_transforms(towers: Sequence[Tower]) -> list[dict[str, Any]]:
    """The towers' image processing as plain values, where all have a ``SquareTransform``; else nothing."""
    found = [getattr(getattr(tower, "backbone", None), "transform", None) for tower in towers]
    if not all(isinstance(each, SquareTransform) for each in found):
        return []
    return [asdict(each) for each in found]  # pyright: ignore[reportArgumentType]


def _whole(image: Image.Image, transform: object, aspect: Aspect) -> Image.Image:
    """The picture before a tower's processing: in RGB, padded where the model pads."""
    picture = as_rgb(image)
    return picture if aspect == "crop" else pad_to_square(picture, _mean_colour(transform))


def _mean_colour(transform: object) -> tuple[float, float, float]:
    """The mean a processor subtracts, which padding becomes zeros by; grey where it isn't known."""
    return transform.mean if isinstance(transform, SquareTransform) else GREY
