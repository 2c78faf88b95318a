"""Taking grids out of a library's own modules: forward hooks, and tokens put on a grid."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in float32 are computed in float32: cuDNN's default on CUDA is TF32."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@contextmanager
def captured(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the modules' outputs while the block runs, under their names."""
    kept: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(_keeper(kept, name)) for name, module in modules.items()
    ]
    try:
        with full_precision():
            yield kept
    finally:
        for handle in handles:
            handle.remove()


def _keeper(kept: dict[str, Tensor], name: str):
    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        # Some versions of transformers' blocks give a tuple with the hidden states first.
        kept[name] = output[0] if isinstance(output, tuple) else output

    return keep


def tokens_to_grid(
    tokens: Float[Tensor, "b t c"], height: int, width: int
) -> Float[Tensor, "b c {height} {width}"]:
    """Patch tokens in row-major order -> a grid: token i stands at (i // width, i % width).

    The released DiT classifier views the tokens as (b c h w) without the transpose, which mixes
    channels and positions (SPEC 2.7, D4).
    """
    batch, _, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, channels, height, width)


def as_grid(output: Tensor) -> Tensor:
    """What a backbone hands out: float32, contiguous, no matter how the model computed it."""
    return output.detach().float().contiguous()
