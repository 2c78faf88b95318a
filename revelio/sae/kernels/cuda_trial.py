"""One small step by every Triton program: whether they compile and run here, before a training begins."""

import torch

from revelio.sae.kernels.base import Gradient, Kernel, Weights
from revelio.sae.optim import AdamRows, AdamStep


@torch.no_grad()
def tried(kernel: Kernel, device: torch.device | str, images: int = 32) -> None:
    """Take the step and wait for it; raises what compiling, launching or running raises.

    Args:
        kernel: one of its own, whose copy of the weights nobody needs.
        device: where it is to run.
        images: of two codes each; 32 make a block of terms (:data:`~revelio.sae.kernels.cuda.TERMS`).
    """
    n, d, k = 64, 16, 2
    rows = torch.sin(torch.arange(n * d, device=device, dtype=torch.float32)).reshape(n, d)
    zeros, x = torch.zeros(n, device=device), rows[:images].contiguous()
    weights = Weights(rows.clone(), zeros, rows.clone(), zeros[:d].clone())
    moments = AdamRows.start(weights.W_enc, weights.W_dec, weights.b_enc, weights.b_dec)
    codes, _ = kernel.encode(x, weights, k)
    outputs = kernel.decode(codes, weights.W_dec)
    of_codes = kernel.code_gradients(codes, outputs, weights.W_dec)
    image = torch.arange(images, device=device).repeat_interleave(k)
    terms = (codes.values.flatten(), of_codes.flatten(), x, outputs, outputs.sum(0))
    kernel.unit_norm(weights, moments)
    gradient = Gradient(codes.indices.flatten(), image, image, *terms)
    kernel.update(weights, moments, gradient, AdamStep(1, 1e-3))
    if x.is_cuda:
        torch.cuda.synchronize(device)
