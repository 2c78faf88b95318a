"""Join the tokens of several towers into one run of image tokens.

    interleave   a0 b0 a1 b1 ...       as in MMVP and the paper (SPEC 3.3)
    sequence     a0 a1 ... b0 b1 ...
    channels     [a0 b0] [a1 b1] ...   each tower fills its share of the width

Interleaving pairs token i of one tower with token i of the next, which means something only where both
stand for the same place of the same picture: :func:`check_alignment` looks at that, and what it finds is told
before a cache is filled and before a stage is trained.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_ext.config import Fusion
from llava_ext.images import smooth_picture
from llava_ext.projector import token_raster
from revelio.wording import plural

if TYPE_CHECKING:
    from llava_ext.towers import Tower

PROBE = (96, 64)  # width and height of the picture towers are compared on: far from square
RASTER = 16
ALIKE = 0.9  # correlation of two towers' probes; the same crop at 32 px and 512 px gives over 0.97


def fuse(kind: Fusion, tokens: Sequence[Float[Tensor, "i t d"]]) -> Float[Tensor, "i T d"]:
    """One run of tokens an image from each tower's.

    Args:
        kind: ``interleave``, ``sequence`` or ``channels``.
        tokens: a tensor a tower.

    Raises:
        ValueError: the towers give different numbers of tokens, which only ``sequence`` takes.
    """
    joined = fused_length(kind, [each.shape[1] for each in tokens])
    if len(tokens) == 1:
        return tokens[0]
    if kind == "sequence":
        return torch.cat(tuple(tokens), dim=1)
    if kind == "channels":
        return torch.cat(tuple(tokens), dim=2)
    images, _, width = tokens[0].shape
    return torch.stack(tuple(tokens), dim=2).reshape(images, joined, width)


def fused_length(kind: Fusion, lengths: Sequence[int]) -> int:
    """Tokens an image after :func:`fuse`.

    Raises:
        ValueError: the towers give different numbers of tokens, which only ``sequence`` takes.
    """
    if kind == "sequence":
        return sum(lengths)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the towers give {', '.join(map(str, lengths))} tokens an image, but `fusion: {kind}` pairs "
            "them one by one: give all towers one budget or choose `fusion: sequence`"
        )
    return lengths[0] if kind == "channels" else sum(lengths)


def widths(kind: Fusion, towers: int, width: int) -> list[int]:
    """How wide each tower's projected tokens are, so that the fused ones are ``width`` wide.

    Raises:
        ValueError: there are more towers than channels to share.
    """
    if kind != "channels":
        return [width] * towers
    if towers > width:
        raise ValueError(
            f"{plural(towers, 'tower')} can't share {plural(width, 'channel')}: choose another fusion"
        )
    share, left = divmod(width, towers)
    return [share + (place < left) for place in range(towers)]


def check_alignment(kind: Fusion, towers: "Sequence[Tower]") -> list[str]:
    """What may be wrong with pairing the towers' tokens place by place; empty where nothing is.

    Compares the shape of the towers' token rasters, and what each tower's own processor makes of one
    oblong picture: another crop, a squashed or a mirrored picture shows.

    Args:
        kind: ``sequence`` pairs nothing, so that nothing can be wrong with it.
        towers: none where a cache stands for them: it was told when that was filled.
    """
    if kind == "sequence" or not towers:
        return []
    first, *others = towers
    raster, seen = token_raster(first.config, first.grid), _probe(first)
    warnings = []
    for tower in others:
        pair = f"{first.config.backbone} and {tower.config.backbone}"
        found = token_raster(tower.config, tower.grid)
        if found != raster:
            warnings.append(
                f"{pair} lay their tokens out as {_size(raster)} and {_size(found)}: "
                "token i of one is not where token i of the other is"
            )
        likeness = float((seen * _probe(tower)).mean())
        if likeness < ALIKE:
            warnings.append(
                f"{pair} don't see the same part of a picture (likeness {likeness:.2f} of 1): "
                f"`fusion: {kind}` pairs tokens of different places"
            )
    return warnings


def _probe(tower: "Tower") -> Float[Tensor, "3 h w"]:
    """What the tower sees of the probe picture, each channel brought to mean 0 and deviation 1."""
    pixels = tower.pixels(smooth_picture(*PROBE))[None].float()
    small = nn.functional.adaptive_avg_pool2d(pixels, RASTER)[0]
    centred = small - small.mean((1, 2), keepdim=True)
    return centred / centred.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-6)


def _size(raster: tuple[int, int]) -> str:
    return f"{raster[0]}x{raster[1]}"
