"""The batch that fits a device's memory, named when a training step of Diff-C went beyond it."""

from copy import deepcopy

import torch
import torch.nn.functional as F

from revelio.activations.fitting import release, smaller_sizes
from revelio.diffc.conv import fixed_order
from revelio.diffc.model import DiffC
from revelio.diffc.train import Training

LEAST = 2  # images that batch norm needs


def too_large(
    training: Training, shape: tuple[int, ...], batch_size: int, error: torch.OutOfMemoryError
) -> ValueError:
    """What to say: which batch fits instead, and how to go on with this one.

    Args:
        training: as it stood; its gradients are dropped.
        shape: of an image's grid (c h w).
        batch_size: that was tried.
        error: what PyTorch said.
    """
    release(error)
    training.optimizer.zero_grad(set_to_none=True)
    sizes = [size for size in reversed(smaller_sizes(batch_size)) if size >= LEAST]
    # The processes of several would wait for each other in a trial.
    alone = training.share.world == 1
    found = next((size for size in sizes if not alone or _fits(training.model, shape, size)), None)
    other = (
        "no smaller one fits: take a smaller width or another layer, in another folder"
        if found is None
        else f"{found} {'fits' if alone else 'may fit'}: begin anew with it in another folder, as batch "
        "norm learns otherwise"
    )
    return ValueError(
        f"batch_size {batch_size} goes beyond the device's memory. {other}; or resume with it as it is under "
        "torchrun, where every process takes a part of each batch, or on a larger device: whole epochs stay"
    )


def _fits(model: DiffC, shape: tuple[int, ...], size: int) -> bool:
    """Whether a training step of so many images does; the model stays as it is."""
    device = next(model.parameters()).device
    try:
        twin = deepcopy(model).train()
        with fixed_order(device):
            logits = twin(torch.zeros(size, *shape, device=device))
            F.cross_entropy(logits, logits.argmax(1)).backward()
    except torch.OutOfMemoryError as error:
        release(error)
        return False
    return True
