"""Every setting of an extraction, declared once; the command line inherits it. Imports no torch.

One pass of the model serves every layer; a pass is one (timestep, prompt policy, draw).
"""

import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any, Literal

from revelio.backbones.config import BackboneConfig
from revelio.bounds import (
    Count,
    Index,
    NotEmpty,
    OutFolder,
    PathFields,
    Seed,
    Workers,
    check_fields,
)
from revelio.data.config import DataConfig

Pool = Literal["mean", "none"] | Count
StoredDtype = Literal["float32", "float16", "bfloat16"]
# Images a batch where nothing is said, and for `auto` without a GPU.
DEFAULT_BATCH = 16


@dataclass(frozen=True)
class ForwardPass:
    """One (timestep, prompt, draws): its stores hold the mean over ``draws``."""

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


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(PathFields):
    """What to extract, from which images, with which model."""

    layers: Annotated[tuple[str, ...], NotEmpty()] = ("up_ft1",)
    """Layers, as `revelio backbones` lists them."""

    timesteps: tuple[Index, ...] = (25,)
    """The model's own training timesteps; none at all for a model without noise (CLIP, DINOv2)."""

    match_snr: Literal["scaled_linear", "linear", "cosine"] | None = None
    """Timesteps are those of this schedule (Stable Diffusion, DiT, DeepFloyd-IF); each is replaced by the
    model's own timestep with the nearest signal-to-noise ratio."""

    prompts: Annotated[tuple[str, ...], NotEmpty()] = ("empty",)
    """Prompt policies: `empty`, `generic`, `from_clip`, `fixed:TEXT`, `captions:FILE` (CSV or JSON Lines,
    with an image and a caption an entry)."""

    draws: Count = 1
    """Noise draws of each image."""

    average_draws: bool = False
    """Store the mean over the draws instead of each draw by itself."""

    pool: Pool = "mean"
    """`mean` over height and width: one vector an image; `none`: the whole grid; a number: the grid
    average-pooled to that side."""

    cells: Count | None = None
    """So many random cells of each grid, a row each with its place, instead of one row an image; an image's
    cells depend on `seed` and its id only. With `pool` a number: cells of the grid pooled to that side."""

    store_dtype: StoredDtype = "float32"
    """The number format of the stored activations; pooling and averaging are done in float32."""

    seed: Seed = 0
    """Seed of the noise; an image's noise depends on it, its id, the timestep and the draw only."""

    batch_size: Literal["auto"] | Count = DEFAULT_BATCH
    """Images per batch; `auto`: on CUDA as many as fit its memory, found by trying; elsewhere 16."""

    workers: Literal["auto"] | Workers = "auto"
    """Processes that read images ahead; `auto`: on CUDA a core each, 16 at most; elsewhere 0."""

    compile: bool = False
    """Compile the VAE's encoder and the model's blocks with `torch.compile`, which takes up to a minute and
    pays on a GPU for some thousand images or more. Stores record it: rows differ by rounding."""

    shard_rows: Count | None = None
    """Images per shard, rounded down to whole batches; none: 1024, or fewer where whole grids are kept."""

    vae_cache: OutFolder | None = None
    """A folder that caches the encoded images (VAE latents), so that later timesteps need no VAE."""

    mode: Literal["fixed", "as_paper", "as_code"] = "fixed"
    """`as_code` brings images to 256 px, as the released extraction does, unless a size is given."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The model."""

    random_weights: Seed | None = None
    """Give the model random weights from this seed: the baseline that shows what training gave. Compare
    stores of the same `layers` only: the model is cut after the deepest before its weights are drawn."""

    def check(self) -> None:
        """Refuse what can't be done, before a model is loaded.

        Raises:
            ValueError: nothing to take, something twice, or a value outside its bounds.
        """
        check_fields(self)
        for name in ("layers", "timesteps", "prompts"):
            given = getattr(self, name)
            if len(set(given)) != len(given):
                raise ValueError(f"{name} has an entry twice: {', '.join(map(str, given))}")
        if not self.timesteps and (self.draws > 1 or self.prompts != ("empty",)):
            raise ValueError("draws and prompts need timesteps: a model without noise has neither")
        if not self.timesteps and self.vae_cache is not None:
            raise ValueError("vae_cache needs timesteps: a model without noise has no VAE")

    @property
    def grid_pool(self) -> Pool:
        """How a grid is pooled; where its cells are stored, a mean over it is not meant."""
        return "none" if self.cells and self.pool == "mean" else self.pool

    def store_name(self, one: ForwardPass, layer: str) -> str:
        """The folder of a store: ``up_ft1-t25-empty-d0``; of cells, ``up_ft1-t25-empty-d0-c64``."""
        return one.store_name(layer) + (f"-c{self.cells}" if self.cells else "")

    def passes(self) -> list[ForwardPass]:
        """The passes in the order they are run."""
        draws = [(draw,) for draw in range(self.draws)]
        if self.average_draws:
            draws = [tuple(range(self.draws))]
        return [
            ForwardPass(timestep, prompt, part)
            for timestep in self.timesteps or (None,)
            for prompt in self.prompts
            for part in draws
        ]

    def row_shape(self, channels: int, side: int) -> tuple[int, ...]:
        """The shape of an image's row, or of its cells', of a layer of ``channels x side x side``."""
        pool = self.grid_pool
        if pool == "mean":
            return (channels,)
        kept = side if pool == "none" else min(int(pool), side)
        return (min(self.cells, kept * kept), channels) if self.cells else (channels, kept, kept)

    @property
    def provenance(self) -> dict[str, Any]:
        """Manifest fields that say how the model was loaded and asked."""
        return {
            "revision": self.backbone.revision,
            "compute_dtype": self.backbone.dtype,
            "attention": self.backbone.attention,
            "mode": self.mode,
            "match_snr": self.match_snr,
            # Stores of before have no such field.
            "compile": self.compile or None,
        }


@dataclass(frozen=True, kw_only=True)
class ExtractRunConfig(ExtractConfig):
    """An extraction into a folder."""

    out: OutFolder
    """The folder that gets one store for each layer, timestep, prompt and draw."""

    resume: bool = False
    """Go on with stores that are there; the result has the same bytes as an uninterrupted run."""


def prompt_slug(policy: str) -> str:
    """A prompt policy as part of a folder's name: ``fixed:TEXT`` is shortened and hashed."""
    if re.fullmatch(r"[a-z0-9_]+", policy):
        return policy
    words = re.sub(r"[^a-z0-9]+", "_", policy.lower()).strip("_")[:32].strip("_")
    return f"{words}-{sha256(policy.encode()).hexdigest()[:6]}"
