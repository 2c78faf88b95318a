"""What an edit changes of a layer's output: a direction is added, or some latents' contributions change.

    direction   x' = x + s v                                          (SPEC 7)
    latents     x' = x + s sum_i (z_i' - z_i) W_dec[i],   z = the k-SAE's codes of x
                scale: z' = c z     clamp: z' = c     ablate: z' = 0     add: z' = z + c

Only the latents' share of the activation changes: what the k-SAE does not explain, and the other latents'
share, stays. The strength s goes from 0 (nothing) to 1 (as written), and beyond.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.inputs import find, like
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.config import Operation

Branch = Literal["opposed", "conditional", "both"]
Read = Literal["cells", "pooled"]
Where = Literal["everywhere", "fires"]

# The change of a layer's output, its positions in a row: (b s d) -> (b s d) or (b 1 d).
Change = Callable[[Float[Tensor, "b s d"]], Float[Tensor, "b s d"]]


@dataclass(frozen=True)
class Edit:
    """A change of one layer while a pipeline runs.

    Attributes:
        layer: its name in :class:`~revelio.backbones.diffusion.pipeline_layers.PipelineLayers`.
        change: what is added to the output, at strength 1.
        width: the channels that it is for.
        strength: what the change is multiplied by.
        branch: of classifier-free guidance. `opposed`: the unconditional call gets the negative, so that
            guidance amplifies the change; `conditional`: it gets nothing; `both`: the same. None: `opposed`
            for a direction, `conditional` for latents; in Flux's denoiser, whose calls can't be told apart,
            `both`.
        timesteps: the first and the last training timestep at which it is made (0 is no noise); None: all.
            Of the denoiser only.
        mask: how much of it each cell of the layer's grid gets, 0 to 1; None: all. Of the denoiser only.
    """

    layer: str
    change: Change
    width: int
    strength: float = 1.0
    branch: Branch | None = None
    timesteps: tuple[int, int] | None = None
    mask: Float[Tensor, "h w"] | None = None


@dataclass(frozen=True)
class Direction:
    """The same vector everywhere, or one a token position.

    Attributes:
        vector: (1 d), or (t d) for the first t positions; beyond them nothing is added.
    """

    vector: Float[Tensor, "t d"]

    def __call__(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """The vector, in the output's number format and length."""
        vector = self.vector.to(x, non_blocking=not self.vector.is_cuda)
        positions = x.shape[1]
        if len(vector) in (1, positions):
            return vector.expand(len(x), -1, -1)
        lacking = max(0, positions - len(vector))
        padded = torch.nn.functional.pad(vector[:positions], (0, 0, 0, lacking))
        return padded.expand(len(x), -1, -1)


@dataclass(frozen=True)
class LatentChange:
    """New codes for some latents of a k-SAE.

    Attributes:
        ksae: the k-SAE of the layer.
        values: c of each latent (ignored where they are ablated).
        operation: how c is used.
        read: encode every cell or token by itself, or their mean, as a k-SAE of pooled activations wants:
            then all cells get the same change.
        where: `add` and `clamp` everywhere, or only where the latent fires; the others change nothing
            elsewhere.
    """

    ksae: KSparseAutoencoder
    values: Mapping[int, float]
    operation: Operation = "scale"
    read: Read = "cells"
    where: Where = "everywhere"

    def __post_init__(self) -> None:
        """Refuse what can't be done.

        Raises:
            ValueError: no latent, one out of range, a value that is no number, an unknown word, or a k-SAE of
                several stores that are each scaled in their own way.
        """
        n = self.ksae.n
        if not self.values:
            raise ValueError("no latents to edit: give at least one")
        for latent, value in self.values.items():
            if not 0 <= latent < n:
                raise ValueError(f"latent {latent} is out of range: the k-SAE has 0 to {n - 1}")
            check_number(value, f"the value of latent {latent}")
        for name, kind in (("operation", Operation), ("read", Read), ("where", Where)):
            check_word(name, getattr(self, name), get_args(kind))
        find(self.ksae.inputs, None)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """sum_i (z_i' - z_i) W_dec[i] at each cell, or of the mean of all cells."""
        read = x.float().mean(dim=1, keepdim=True) if self.read == "pooled" else x
        latents = list(self.values)
        rows = read.flatten(0, 1)
        device = self.ksae.W_dec.device
        # Whole numbers are values too.
        values = [float(value) for value in self.values.values()]
        target = torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
        places = torch.tensor(latents).to(device, non_blocking=True)
        directions = in_activations(self.ksae, self.ksae.W_dec[places])
        if self.operation == "add" and self.where == "everywhere":
            delta = (target @ directions).expand(len(rows), -1)  # nothing has to be encoded
        else:
            delta = self._moved(codes_of(self.ksae, rows, latents), target) @ directions
        return delta.view(*read.shape[:2], self.ksae.d).to(x)

    def _moved(self, z: Float[Tensor, "r l"], c: Float[Tensor, " l"]) -> Float[Tensor, "r l"]:
        """Z' - z."""
        moved = {"scale": (c - 1) * z, "clamp": c - z, "ablate": -z, "add": c.expand_as(z)}
        change = moved[self.operation]
        return change * (z != 0) if self.where == "fires" else change


def in_activations(ksae: KSparseAutoencoder, share: Float[Tensor, "*r d"]) -> Float[Tensor, "*r d"]:
    """What latents contribute, in the scale of the activations: a k-SAE may have been trained on scaled ones.

    Raises:
        ValueError: it was trained on several stores, each scaled in its own way.
    """
    scaled = find(ksae.inputs, None)
    return share if scaled is None else share * like(share, scaled.scale)


@torch.no_grad()
def codes_of(
    ksae: KSparseAutoencoder, rows: Float[Tensor, "r d"], latents: list[int]
) -> Float[Tensor, "r l"]:
    """The sparse codes of some latents, 0 where they are not active."""
    wanted = torch.tensor(latents)
    codes = ksae.encode(rows, latents=wanted)
    wanted = wanted.to(codes.indices.device, non_blocking=True)
    place = torch.full((ksae.n,), -1, device=wanted.device)
    place[wanted] = torch.arange(len(latents), device=wanted.device)
    columns = place[codes.indices]
    kept = codes.values.masked_fill(columns < 0, 0.0)
    empty = torch.zeros(len(rows), len(latents), device=wanted.device)
    return empty.scatter_add_(1, columns.clamp(min=0), kept)


def check_number(value: object, what: str) -> float:
    """A finite number.

    Raises:
        ValueError: it is something else.
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} is {str(value)[:80]!r}: give a number") from error
    if not torch.isfinite(torch.tensor(number)):
        raise ValueError(f"{what} is {value!r}: give a finite number")
    return number


def check_word(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not one of ``allowed``.

    Raises:
        ValueError: it is another.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose from {', '.join(allowed)}")
