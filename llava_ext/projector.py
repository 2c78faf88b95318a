"""One projector a tower: grid to tokens, then linear - GELU - linear to the language model's width.

CLIP       1024 -> 4096 -> 4096                      20.98 M parameters
SD-1.5     conv block 21.24 M, then 1024 -> 4096 -> 4096
"""

from jaxtyping import Float
from torch import Tensor, nn

from llava_ext.config import TowerConfig
from llava_ext.tokens import build_tokens


class Projector(nn.Module):
    """What is learnt between a frozen tower and the language model.

    Attributes:
        tokens: grid to tokens; of the three ways only ``conv`` has weights.
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
        self.mlp = nn.Sequential(
            nn.Linear(width, width_out), nn.GELU(), nn.Linear(width_out, width_out)
        )

    def forward(self, grids: Float[Tensor, "i c h w"]) -> Float[Tensor, "i t d"]:
        """Projected tokens in reading order, in the projector's own number format."""
        return self.mlp(self.tokens(grids.to(next(self.mlp.parameters()).dtype)))
