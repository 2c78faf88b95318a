"""What all diffusion models share; a family is one subclass in one file of this package.

    pixels -> encode: z_0 -> q(z_t | z_0) -> predict, read by hooks and given up after the deepest layer

A family says how it is recognized (the classes of its parts in ``model_index.json``), which layers its
config tells of, and how its denoiser is loaded, conditioned and called. :func:`register_family` makes it
known; every module of this package is imported when a model's folder has to be recognized, so that nothing
else is edited to add one.

Describing models needs no torch: it is imported inside functions, here and in the families' files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from revelio.backbones.layers import Layers, LayerSpec, check_layers, cut_after
from revelio.backbones.source import Source
from revelio.wording import plural

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from jaxtyping import Float, Int64
    from torch import Tensor, nn

    from revelio.backbones.diffusion.conditioning import Conditioning
    from revelio.backbones.diffusion.schedule import Schedule
    from revelio.backbones.diffusion.vae import LatentSpace
    from revelio.backbones.loading import LoadSettings


@dataclass(frozen=True)
class Shape:
    """What a model's config files say.

    Attributes:
        layers: all its layers, in order of depth.
        image_size: the side of the square it was trained on, in pixels.
        multiple: what the side of an image must be a multiple of, in pixels.
    """

    layers: Layers
    image_size: int
    multiple: int


@dataclass(frozen=True)
class Request:
    """What to load of which model: what a family's ``load`` needs beside the config files.

    Attributes:
        source: the model's folder.
        settings: number format, device, attention.
        layers: up to the deepest that was asked for.
        side: of the square images, in pixels.
        multiple: what it is a multiple of.
    """

    source: Source
    settings: LoadSettings
    layers: Layers
    side: int
    multiple: int

    @property
    def whole(self) -> bool:
        """Whether nothing is to be cut off: no layers were asked for."""
        return self.settings.layers is None

    def common(self) -> dict[str, Any]:
        """The arguments of :class:`DiffusionBackbone` itself."""
        from revelio.backbones.diffusion.scheduler import load_schedule

        return {
            "name": self.source.name,
            "layers": self.layers,
            "image_size": self.side,
            "schedule": load_schedule(self.source),
            "whole": self.whole,
            "source": self.source,
        }

    def flow(self) -> dict[str, Any]:
        """As :meth:`common`, of a model that was trained on a rectified flow.

        Raises:
            ValueError: its scheduler's config is of another schedule.
        """
        common = self.common()
        if common["schedule"].prediction != "flow":
            raise ValueError(
                f"the scheduler of {self.source.name} is of a diffusion, not of a rectified flow: it belongs "
                "to another model"
            )
        return common


class DiffusionBackbone(ABC):
    """A frozen denoiser with its noise schedule: see :class:`revelio.backbones.base.DiffusionModel`.

    Attributes:
        family: what the kind of model is called.
        kind: what ``revelio backbones`` says it is.
        title: how messages name the models of the family.
        parts: the class of each part that model_index.json must list, or the classes that it may be of.
        optional: parts that it may list, and their classes.
        without: parts that it must not list.
        pipelines: names of diffusers' pipelines of the family, to say what a broken folder lacks.
        output_position: of the layer's tensor where its module gives several; see :func:`hooked`.
    """

    family: ClassVar[str]
    kind: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[Mapping[str, str | tuple[str, ...]]]
    optional: ClassVar[Mapping[str, str]] = {}
    without: ClassVar[tuple[str, ...]] = ()
    pipelines: ClassVar[tuple[str, ...]] = ()
    output_position: ClassVar[int] = 0

    latents: LatentSpace  # of a model on pixels a PixelSpace

    def __init__(
        self,
        name: str,
        layers: Layers,
        image_size: int,
        schedule: Schedule,
        *,
        whole: bool = False,
        source: Source | None = None,
    ) -> None:
        """What every family's ``__init__`` passes on.

        Args:
            name: what results call the model.
            layers: the layers it has, in order of depth.
            image_size: the side of the square its transform gives, in pixels.
            schedule: of its noise.
            whole: whether it was left uncut, so that it can predict, decode and generate.
            source: where its scheduler for generation is read from.
        """
        from revelio.data.transforms import SquareTransform

        self.name = name
        self.layers: Mapping[str, LayerSpec] = layers
        self.transform = SquareTransform(image_size)
        self.schedule = schedule
        self._whole = whole
        self._source = source

    @classmethod
    @abstractmethod
    def load(cls, request: Request) -> DiffusionBackbone:
        """Load the parts, cut after the request's layers unless all is wanted.

        Raises:
            ValueError: a part is missing, unreadable, or doesn't fit.
        """

    @classmethod
    @abstractmethod
    def shape(cls, source: Source) -> Shape:
        """What the config files say, without weights and without torch.

        Raises:
            ValueError: they are missing, or lack something.
        """

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The denoiser."""

    @abstractmethod
    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """See :meth:`DiffusionModel.conditioning`."""

    @abstractmethod
    def denoise(self, x_t: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of the denoiser; ``x_t`` has its number format, ``times`` (b) are on its device."""

    @abstractmethod
    def layer_module(self, layer: str) -> nn.Module:
        """The module whose output is one of ``self.layers``."""

    @abstractmethod
    def build_pipeline(self, scheduler: Any) -> DiffusionPipeline:
        """Diffusers' pipeline of the loaded parts and a scheduler."""

    def as_grid(self, output: Tensor, x_t: Tensor) -> Tensor:
        """A layer's output as a grid; transformers override it."""
        return output

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c zh zw"]:
        """VAE latents z_0 in float16, or pixels; see :meth:`LatentSpace.encode`."""
        return self.latents.encode(pixels)

    def decode(self, z: Float[Tensor, "b c zh zw"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels of latents; see :meth:`LatentSpace.decode`."""
        return self.latents.decode(z)

    def module(self, layer: str) -> nn.Module:
        """See :meth:`Backbone.module`."""
        check_layers(self.layers, [layer], self.name)
        return self.layer_module(layer)

    def check(self, timestep: int | None, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a timestep or a prompt that the model does not take."""
        self.schedule.check(timestep, self.name)

    def activations(
        self,
        encoded: Float[Tensor, "b c h w"],
        ids: Sequence[str],
        layers: Sequence[str],
        *,
        timestep: int | None = None,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> dict[str, Float[Tensor, "b c h w"]]:
        """See :meth:`Backbone.activations`."""
        import torch

        from revelio.backbones.hooks import as_activation, read_layers
        from revelio.backbones.loading import check_batch

        check_layers(self.layers, layers, self.name)
        check_batch(len(encoded), ids, prompts)
        texts = [""] * len(encoded) if prompts is None else prompts
        self.check(timestep, texts)
        assert timestep is not None  # checked
        with torch.no_grad():
            x_t = self.noised(encoded, ids, timestep=timestep, seed=seed, draw=draw)
            conditioning = self.conditioning(texts)
            found = read_layers(
                self,
                layers,
                lambda: self._run(x_t, timestep, conditioning),
                until=self._last_of(layers),
            )
        return {layer: as_activation(self.as_grid(found[layer], x_t)) for layer in layers}

    def noised(
        self,
        encoded: Float[Tensor, "b c h w"],
        ids: Sequence[str],
        *,
        timestep: int,
        seed: int = 0,
        draw: int = 0,
    ) -> Float[Tensor, "b c h w"]:
        """A draw of q(x_t | x_0), keyed by (seed, id, timestep, draw), in float32 on the model's device.

        Raises:
            ValueError: the timestep is outside the schedule.
        """
        from revelio.backbones.diffusion.schedule import keyed_noise

        step = self.schedule.check(timestep, self.name)
        noise = keyed_noise(encoded.shape[1:], ids, seed=seed, timestep=step, draw=draw)
        clean = encoded.to(self._device, non_blocking=not encoded.is_cuda)
        if clean.is_cuda:
            # From pinned memory a copy does not wait for the device.
            noise = noise.pin_memory().to(clean.device, non_blocking=True)
        return self.schedule.add_noise(clean, noise, step)

    def predict(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: int | Int64[Tensor, " b"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """See :meth:`DiffusionModel.predict`; a gradient flows back to x_t and to whatever edits add."""
        from revelio.backbones.hooks import full_precision

        self._check_whole("predict")
        if len(conditioning) != len(x_t):
            raise ValueError(
                f"{plural(len(x_t), 'image')} but a conditioning of {len(conditioning)}"
            )
        with full_precision():
            return self._run(x_t, t, conditioning)

    def pipeline(self) -> DiffusionPipeline:
        """See :meth:`DiffusionModel.pipeline`."""
        from revelio.backbones.diffusion.scheduler import load_scheduler

        self._check_whole("generate")
        if self._source is None:
            raise ValueError(
                f"{self.name} was made of parts in memory: it has no scheduler to generate with"
            )
        return self.build_pipeline(load_scheduler(self._source))

    def _run(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: int | Int64[Tensor, " b"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        import torch

        ready = x_t.to(self._device, next(self.network.parameters()).dtype)
        if isinstance(t, int):
            time = self.schedule.times[self.schedule.check(t, self.name)].item()
            times = torch.full((len(ready),), time, device=ready.device)
        else:
            steps = t.cpu()
            for end in (int(steps.min()), int(steps.max())):
                self.schedule.check(end, self.name)
            times = self.schedule.times[steps].to(ready.device, non_blocking=True)
        return self.denoise(ready, times, conditioning)

    def _last_of(self, layers: Sequence[str]) -> str | None:
        """The layer after which a pass may be given up; None where the model ends there anyway."""
        if not layers:
            return None
        order = list(self.layers)
        deepest = max(layers, key=order.index)
        return deepest if self._whole or deepest != order[-1] else None

    def _check_whole(self, verb: str) -> None:
        if not self._whole:
            last = list(self.layers)[-1]
            raise ValueError(
                f"{self.name} was cut after {last} when it was loaded, so it can't {verb}: load it whole, "
                "with layers=None"
            )

    @property
    def _device(self) -> Any:
        return next(self.network.parameters()).device


F = TypeVar("F", bound=type[DiffusionBackbone])

_families: dict[str, type[DiffusionBackbone]] = {}


def register_family(family: F) -> F:
    """Make a family known; a decorator of its class.

    Raises:
        ValueError: another class has its name.
    """
    taken = _families.setdefault(family.family, family)
    if (taken.__module__, taken.__qualname__) != (family.__module__, family.__qualname__):
        raise ValueError(f"a family {family.family!r} is registered already: choose another name")
    return family


def registered_families() -> list[type[DiffusionBackbone]]:
    """The families that have been imported, in order of their names."""
    return [_families[name] for name in sorted(_families)]


def load_family(
    family: type[DiffusionBackbone], source: Source, settings: LoadSettings
) -> DiffusionBackbone:
    """Load a model of a family: whole, or cut after the deepest layer that was asked for.

    Raises:
        KeyError: an unknown layer.
        ValueError: a setting the model can't take; or a part is missing, unreadable, or doesn't fit.
    """
    shape = family.shape(source)
    layers = cut_after(shape.layers, settings.layers, source.name)
    side = settings.side(shape.image_size, shape.multiple, source.name)
    return family.load(Request(source, settings, layers, side, shape.multiple))
