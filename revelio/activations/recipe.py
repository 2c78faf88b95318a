"""What an extraction takes: layers x timesteps x prompts x draws, and how grids become rows.

One pass of the model serves every layer; a pass is one (timestep, prompt policy, draw).
"""

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from revelio.activations.shard import DTYPES

Pool = Literal["mean", "none"] | int


@dataclass(frozen=True)
class Pass:
    """One (timestep, prompt policy, draws): its stores hold the mean over ``draws``."""

    timestep: int | None
    prompt: str
    draws: tuple[int, ...]

    def store_name(self, layer: str) -> str:
        """The folder of the store of ``layer``: ``up_ft1-t25-empty-d0``; a ViT's is its layer."""
        if self.timestep is None:
            return layer
        first, last = self.draws[0], self.draws[-1]
        draws = f"d{first}" if first == last else f"d{first}-{last}"
        return f"{layer}-t{self.timestep}-{prompt_slug(self.prompt)}-{draws}"


@dataclass(frozen=True)
class Recipe:
    """What to take of every image.

    Attributes:
        layers: layer names of the backbone.
        timesteps: the model's own training indices; empty for a model without noise (ViT).
        prompts: prompt policies.
        draws: how many noise draws, counted from 0.
        average_draws: store the mean over the draws instead of each.
        seed: of the noise.
        pool: ``mean`` over height and width (one vector an image), ``none`` (the whole grid), or
            a side: the grid average-pooled to it (a grid that is smaller stays as it is).
        dtype: of the stored activations; pooling and averaging are done in float32.
    """

    layers: tuple[str, ...]
    timesteps: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ("empty",)
    draws: int = 1
    average_draws: bool = False
    seed: int = 0
    pool: Pool = "mean"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Refuse what can't be done.

        Raises:
            ValueError: nothing to take, something twice, or a value out of range.
        """
        for name in ("layers", "timesteps", "prompts"):
            given = getattr(self, name)
            if len(set(given)) != len(given):
                raise ValueError(f"{name} has an entry twice: {', '.join(map(str, given))}")
        if not self.layers or not self.prompts:
            raise ValueError("layers and prompts must have at least one entry each")
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}: it must be at least 1")
        if not self.timesteps and (self.draws > 1 or self.prompts != ("empty",)):
            raise ValueError("draws and prompts need timesteps: a model without noise has neither")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: allowed are {', '.join(DTYPES)}")
        named = self.pool in ("mean", "none")
        if not named and (isinstance(self.pool, bool | str) or self.pool < 1):
            raise ValueError(f"pool is {self.pool!r}: allowed are mean, none, or a side >= 1")

    def passes(self) -> list[Pass]:
        """The passes in the order they are run."""
        draws = [(draw,) for draw in range(self.draws)]
        if self.average_draws:
            draws = [tuple(range(self.draws))]
        return [
            Pass(timestep, prompt, part)
            for timestep in self.timesteps or (None,)
            for prompt in self.prompts
            for part in draws
        ]

    @property
    def model_passes(self) -> int:
        """How often an image goes through the model (its encoding aside)."""
        return len(self.timesteps or (None,)) * len(self.prompts) * self.draws

    def row_shape(self, channels: int, side: int) -> tuple[int, ...]:
        """The shape of a row of a layer whose grid is ``channels x side x side``."""
        if self.pool == "mean":
            return (channels,)
        kept = side if self.pool == "none" else min(int(self.pool), side)
        return (channels, kept, kept)

    def pooled(self, grid: Float[Tensor, "b ..."]) -> Shaped[Tensor, "b ..."]:
        """Grids (b c h w), or tokens (b t d) where the pool is ``mean``, as rows, in float32."""
        whole = grid.float()
        if whole.ndim == 3:
            return whole.mean(dim=1)
        if self.pool == "mean":
            return whole.mean(dim=(2, 3))
        if self.pool == "none":
            return whole
        height, width = whole.shape[2:]
        return adaptive_avg_pool2d(whole, (min(self.pool, height), min(self.pool, width)))


def prompt_slug(policy: str) -> str:
    """A prompt policy as part of a folder's name: ``fixed:TEXT`` is shortened and hashed."""
    if re.fullmatch(r"[a-z0-9_]+", policy):
        return policy
    words = re.sub(r"[^a-z0-9]+", "_", policy.lower()).strip("_")[:32].strip("_")
    return f"{words}-{sha256(policy.encode()).hexdigest()[:6]}"
