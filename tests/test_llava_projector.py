"""Token steps and projectors: shapes, the paper's parameter counts, plain loops."""

import pytest
import torch

from llava_ext.config import TowerConfig
from llava_ext.projector import Projector, build_tokens, conv_stride, token_raster

CLIP = TowerConfig("clip-vit-l-14", "block22")
SD = TowerConfig("sd-1.5", "up_ft1", timestep=25, tokens="conv")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_papers_projectors():
    with torch.device("meta"):
        clip, sd = Projector(CLIP, 1024, (16, 16), 4096), Projector(SD, 1280, (32, 32), 4096)
        assert count(clip) == count(sd.mlp) == 20_979_712  # 20.98 M
        assert count(sd.tokens) == 21_235_712  # 21.24 M
        assert clip(torch.empty(2, 1024, 16, 16)).shape == (2, 256, 4096)
        assert sd(torch.empty(2, 1280, 32, 32)).shape == (2, 256, 4096)
    assert [type(part).__name__ for part in clip.mlp] == ["Linear", "GELU", "Linear"]


def test_flatten_reads_row_by_row():
    grid = torch.arange(2 * 3 * 2 * 2).float().view(2, 3, 2, 2)
    step, width = build_tokens(TowerConfig("a", "b", budget=4), 3, (2, 2))
    tokens = step(grid)
    assert width == 3
    for place, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.equal(tokens[:, place], grid[:, :, row, column])


def test_pool_averages_squares():
    grid = torch.randn(2, 3, 4, 4)
    step, _ = build_tokens(TowerConfig("a", "b", tokens="pool", budget=4), 3, (4, 4))
    tokens = step(grid)
    assert torch.allclose(tokens[:, 1], grid[:, :, :2, 2:].mean((2, 3)))
    assert torch.allclose(tokens[:, 2], grid[:, :, 2:, :2].mean((2, 3)))
    assert step(grid[:0]).shape == (0, 4, 3)


def test_the_conv_block_is_two_convolutions_with_one_gelu_between():
    config = TowerConfig("a", "b", tokens="conv", budget=4, width=5)
    projector = Projector(config, 3, (4, 4), 6)
    grid = torch.randn(1, 3, 4, 4)
    first, second = projector.tokens.conv1, projector.tokens.conv2
    hidden = torch.zeros(5, 4, 4)
    around = torch.nn.functional.pad(grid[0], (1, 1, 1, 1))
    for row in range(4):
        for column in range(4):
            window = around[:, row : row + 3, column : column + 3]
            hidden[:, row, column] = (first.weight * window).sum((1, 2, 3)) + first.bias
    around = torch.nn.functional.pad(torch.nn.functional.gelu(hidden), (1, 1, 1, 1))
    for place, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        window = around[:, row : row + 3, column : column + 3]
        wanted = (second.weight * window).sum((1, 2, 3)) + second.bias
        assert torch.allclose(projector.tokens(grid)[0, place], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "budget", "stride"),
    [((32, 32), 1024, 1), ((32, 32), 256, 2), ((32, 32), 64, 4), ((16, 16), 16, 4), ((9, 6), 6, 3)],
)
def test_the_stride_meets_the_budget(grid, budget, stride):
    config = TowerConfig("a", "b", tokens="conv", budget=budget, width=2)
    assert conv_stride(config, grid) == stride
    step, _ = build_tokens(config, 3, grid)
    tokens = step(torch.zeros(1, 3, *grid))
    assert tokens.shape == (1, budget, 2)
    height, width = token_raster(config, grid)
    assert height * width == budget


@pytest.mark.parametrize(
    ("tokens", "budget", "message"),
    [
        ("flatten", 256, "makes 64 tokens, not 256"),
        ("pool", 15, "square number of at most 64"),
        ("pool", 81, "square number of at most 64"),
        ("conv", 60, "64, 16, 4 tokens of it, not 60"),
    ],
)
def test_a_budget_that_cannot_be_met_names_those_that_can(tokens, budget, message):
    with pytest.raises(ValueError, match=message):
        token_raster(TowerConfig("a", "b", tokens=tokens, budget=budget), (8, 8))


def test_settings_below_one_are_errors():
    with pytest.raises(ValueError, match="`budget` of tower a is 0"):
        TowerConfig("a", "b", budget=0)
