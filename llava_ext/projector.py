"""One projector a tower: from a grid to tokens, then linear - GELU - linear to the language model's width.

With `normalize` each token is brought to mean 0 and deviation 1 first (a layer norm without weights).

Grid to tokens, row by row: as it is, averaged, or by the paper's conv block (SPEC 3.2).

    flatten  (i c h w) -> (i h*w c)
    pool     adaptive average to a square of `budget` cells, then flatten
    resample softmax(q (W_k x + p)^T / sqrt(width)) W_v x, then W_o: `budget` learned queries q, places p
    conv     Conv3x3 c -> width, stride 1 - GELU - Conv3x3 width -> width, stride s, then flatten

For SD-1.5's up_ft1 (1280x32x32) at 256 tokens the stride is 2, as in the paper; nothing follows the
second convolution. 21.24 M parameters at c = 1280, width = 1024; 20.98 M of the linear layers from 1024 to
4096.
"""

from math import gcd, isqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, layer_norm

from llava_ext.config import TowerConfig
from revelio.wording import plural

KERNEL = 3
# Two 3x3 convolutions see 5x5 cells; a greater stride would leave cells that no token sees.
MAX_STRIDE = 2 * KERNEL - 1


def token_raster(config: TowerConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tokens of an image.

    Args:
        config: the tower's.
        grid: height and width of the layer's grid.

    Raises:
        ValueError: the budget can't be met; the message lists what can.
    """
    height, width = grid
    who = f"{config.backbone} {config.layer} gives a grid of {height}x{width}"
    if config.tokens == "flatten":
        if config.budget != height * width:
            raise ValueError(
                f"{who}, which `tokens: flatten` makes {plural(height * width, 'token')}, not "
                f"{config.budget}: set `budget: {height * width}` or choose `tokens: pool` or `conv`"
            )
        return grid
    if config.tokens == "pool":
        side = isqrt(config.budget)
        if side * side != config.budget or side > min(grid):
            raise ValueError(
                f"{who}; `tokens: pool` takes a square number of at most {plural(min(grid) ** 2, 'token')}, "
                f"not {config.budget}"
            )
        return side, side
    if config.tokens == "resample":
        return 1, config.budget
    stride = conv_stride(config, grid)
    return height // stride, width // stride


def conv_stride(config: TowerConfig, grid: tuple[int, int]) -> int:
    """The stride of the conv block's second convolution that meets the budget.

    Raises:
        ValueError: there is none; the message lists the budgets that have one.
    """
    height, width = grid
    common = gcd(height, width)
    strides = [s for s in range(1, MAX_STRIDE + 1) if common % s == 0]
    budgets = {height * width // (s * s): s for s in strides}
    if config.budget not in budgets:
        raise ValueError(
            f"{config.backbone} {config.layer} gives a grid of {height}x{width}; `tokens: conv` makes "
            f"{', '.join(map(str, budgets))} tokens of it, not {config.budget}: "
            "choose one of these or `tokens: pool`"
        )
    return budgets[config.budget]


class Flatten(nn.Module):
    """A grid as tokens, row by row."""

    def forward(self, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i t c"]:
        """Tokens in reading order."""
        return grids.flatten(2).transpose(1, 2)


class Pool(nn.Module):
    """Average the grid to a raster, then flatten."""

    def __init__(self, raster: tuple[int, int]) -> None:
        super().__init__()
        self.raster = raster

    def forward(self, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i t c"]:
        """Tokens in reading order."""
        if not len(grids):  # PyTorch pools no empty batch.
            return grids.new_zeros(0, self.raster[0] * self.raster[1], grids.shape[1])
        return adaptive_avg_pool2d(grids, self.raster).flatten(2).transpose(1, 2)


class ConvBlock(nn.Module):
    """The paper's two convolutions, then flatten."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, KERNEL, padding=1)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, KERNEL, stride=stride, padding=1)

    def forward(self, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i t d"]:
        """Tokens in reading order."""
        return self.conv2(self.act(self.conv1(grids))).flatten(2).transpose(1, 2)


class Resampler(nn.Module):
    """Learned queries that attend to all cells: one cross-attention, as in Flamingo's and Qwen-VL's."""

    def __init__(self, channels: int, cells: int, budget: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.queries = nn.Parameter(torch.randn(budget, width))
        self.places = nn.Parameter(torch.randn(cells, width) * width**-0.5)
        self.keys = nn.Linear(channels, width)
        self.values = nn.Linear(channels, width)
        self.out = nn.Linear(width, width)

    def forward(self, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i t d"]:
        """A token a query."""
        cells = self.norm(grids.flatten(2).transpose(1, 2))
        keys = self.keys(cells) + self.places
        alike = self.queries @ keys.transpose(1, 2) * self.queries.shape[1] ** -0.5
        return self.out(alike.softmax(-1) @ self.values(cells))


def build_tokens(
    config: TowerConfig, channels: int, grid: tuple[int, int]
) -> tuple[nn.Module, int]:
    """The step from grid to tokens, and the tokens' width.

    Raises:
        ValueError: the budget can't be met.
    """
    raster = token_raster(config, grid)
    if config.tokens == "flatten":
        return Flatten(), channels
    if config.tokens == "pool":
        return Pool(raster), channels
    if config.tokens == "resample":
        cells, width = grid[0] * grid[1], config.width
        return Resampler(channels, cells, config.budget, width), width
    return ConvBlock(channels, config.width, conv_stride(config, grid)), config.width


class Projector(nn.Module):
    """What is learnt between a frozen tower and the language model.

    Attributes:
        tokens: grid to tokens; only ``conv`` and ``resample`` have weights.
        mlp: linear, GELU, linear; numbered 0, 1, 2 as in LLaVA's ``mm_projector``.
    """

    def __init__(
        self, config: TowerConfig, channels: int, grid: tuple[int, int], width_out: int
    ) -> None:
        """Random weights, by PyTorch's own rules.

        Args:
            config: the tower's.
            channels: of the tower's grid.
            grid: its height and width.
            width_out: of the projected tokens.

        Raises:
            ValueError: the tower's budget can't be met.
        """
        super().__init__()
        self.tokens, width = build_tokens(config, channels, grid)
        self.normalize = config.normalize
        self.mlp = nn.Sequential(
            nn.Linear(width, width_out), nn.GELU(), nn.Linear(width_out, width_out)
        )

    def forward(self, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i t d"]:
        """Projected tokens in reading order, in the projector's own number format."""
        tokens = self.tokens(grids.to(next(self.mlp.parameters()).dtype))
        return self.mlp(layer_norm(tokens, tokens.shape[-1:]) if self.normalize else tokens)
