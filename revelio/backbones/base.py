"""The protocols: what can be asked of any frozen model, and what of a diffusion model beside that.

A :class:`Backbone` gives the activations of its layers. A :class:`DiffusionModel` is a backbone that also
predicts, decodes and generates, so that steering, attribution and the Diffusion Classifier use the same
object as extraction. Layers are read and edited through :func:`revelio.backbones.hooks.hooked`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor, nn

from revelio.backbones.diffusion.conditioning import Conditioning as Conditioning
from revelio.backbones.diffusion.schedule import Schedule
from revelio.backbones.layers import LayerSpec as LayerSpec

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class Backbone(Protocol):
    """Any frozen model whose layers can be read.

    Attributes:
        name: what results call the model: its registered name, or the folder's or hub id's.
        layers: the layers it has, in order of depth; a model that was loaded for some ends with the deepest.
        transform: a picture -> pixels (3 h w), with the model's own size and normalization.
    """

    name: str
    layers: Mapping[str, LayerSpec]
    transform: Callable[[Image.Image], Float[Tensor, "3 h w"]]

    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h w"]:
        """What all passes share and a cache may keep: VAE latents z_0; for a ViT the pixels as they are.

        The result is on the model's device, in half precision (float16) where it is worth caching, so that
        activations are the same from fresh and from cached latents.
        """
        ...

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
        """The activations of ``layers``, all from one pass, in float32 on the model's device.

        Those of a layer of kind ``tokens`` are (b t d).

        Args:
            encoded: what :meth:`encode` gave, on any device.
            ids: the images' ids; noise is keyed by (seed, id, timestep, draw).
            layers: names out of ``self.layers``.
            timestep: the model's own training index; None for a model without noise.
            prompts: a text an image; None is the empty prompt (of a class-conditional model: no class).
            seed: of the noise.
            draw: which of several noise draws.

        Raises:
            KeyError: an unknown layer; the message lists the known ones.
            ValueError: a timestep outside the schedule, or missing, or given to a model without noise.
        """
        ...

    def module(self, layer: str) -> nn.Module:
        """Where a layer's output appears: to read it or to edit it.

        Raises:
            KeyError: an unknown layer; the message lists the known ones.
        """
        ...


@runtime_checkable
class DiffusionModel(Backbone, Protocol):
    """A backbone that denoises.

    Attributes:
        schedule: of its noise: q(x_t | x_0), and what its prediction says of noise and image.
    """

    schedule: Schedule

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """Every text input that the denoiser takes; each distinct prompt is encoded once."""
        ...

    def predict(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: "int | Int64[Tensor, ' b']",
        conditioning: Conditioning,
    ) -> Float[Tensor, "b c h w"]:
        """The model's own output at training index t: noise, velocity, image or flow, as its schedule says.

        Raises:
            ValueError: the model was cut when it was loaded.
        """
        ...

    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """Pixels from -1 to 1 of what :meth:`encode` gives.

        Raises:
            ValueError: the model was cut when it was loaded.
        """
        ...

    def pipeline(self) -> "DiffusionPipeline":
        """The model as diffusers' own pipeline, for generation; it shares the weights.

        Raises:
            ValueError: the model was cut when it was loaded.
        """
        ...


@runtime_checkable
class EmbeddingModel(Backbone, Protocol):
    """A backbone without noise that sums an image up at its end.

    Attributes:
        other_tokens: how many tokens stand before the patches in a layer's output.
    """

    other_tokens: int

    def embed(self, encoded: Float[Tensor, "b c h w"]) -> Float[Tensor, "b parts d"]:
        """The final embedding, in its parts.

        Raises:
            ValueError: the model was cut when it was loaded.
        """
        ...


def schedule_of(backbone: Backbone) -> Schedule | None:
    """The noise schedule of a diffusion model; None for a model without noise."""
    return backbone.schedule if isinstance(backbone, DiffusionModel) else None


def check_request(backbone: Backbone, timestep: int | None, prompts: Sequence[str]) -> None:
    """Raise now what ``activations`` would raise about timestep and prompts, where the model can tell.

    Raises:
        ValueError: a timestep or a prompt that the model does not take.
    """
    check = getattr(backbone, "check", None)
    if check is not None:
        check(timestep, prompts)
