"""A U-Net's training step as CUDA graphs: a small network is launched faster than kernel by kernel.

A step of a few million parameters is thousands of kernels of some microseconds, which Python cannot
launch as fast as the GPU runs them. Recorded once for one batch size, forward and backward pass are
one launch each.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)


class Call(nn.Module):
    """A U-Net as a function of tensors alone."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """The predicted noise `(b, 4, h, w)`."""
        return self.unet(noisy, timesteps, encoder_hidden_states=states, return_dict=False)[0]


def record(
    unet: nn.Module, noisy: torch.Tensor, states: torch.Tensor, dtype: torch.dtype
) -> nn.Module | None:
    """The U-Net recorded for batches like these, or None where it cannot be recorded.

    Args:
        unet: In evaluation mode, which trains the same, as it drops nothing out.
        noisy: `(b, 4, h, w)` on the GPU, in the memory format that batches will have.
        states: `(b, t, d)`.
        dtype: Of the products.
    """
    timesteps = torch.zeros(len(noisy), dtype=torch.long, device=noisy.device)
    try:
        # Kept casts of the weights would be those of the recording for ever.
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            found = torch.cuda.make_graphed_callables(
                Call(unet).eval(), (noisy, timesteps, states), allow_unused_input=True
            )
    except RuntimeError as error:
        logger.warning(f"no CUDA graph, one kernel at a time instead: {error}")
        return None
    unet.zero_grad(set_to_none=True)
    return found  # pyright: ignore
