"""What fits a device's memory, named when Diff-C's training or the backbone that makes its views did not."""

from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from revelio.activations.fitting import smaller_sizes
from revelio.device_memory import largest, not_one_fits, release
from revelio.diffc.conv import fixed_order
from revelio.diffc.model import DiffC
from revelio.diffc.sources import PLAIN, GridSource
from revelio.diffc.train import Training

LEAST = 2  # images that batch norm needs


def too_large(
    training: Training, source: GridSource, batch_size: int, error: torch.OutOfMemoryError
) -> ValueError:
    """What to say of a training step: which batch fits instead, and how to go on with this one.

    Args:
        training: as it stood; its gradients are dropped.
        source: of the grids.
        batch_size: that was tried.
        error: what PyTorch said.
    """
    release(error)
    training.optimizer.zero_grad(set_to_none=True)
    sizes = [size for size in reversed(smaller_sizes(batch_size)) if size >= LEAST]
    # The processes of several would wait for each other in a trial.
    alone = training.share.world == 1
    tried = largest(sizes, partial(training_step, training.model, source)) if alone else 0
    found = tried if alone else max(sizes, default=0)
    other = (
        f"{found} {'fits' if alone else 'may fit'}: begin anew with it in another folder, as batch "
        "norm learns otherwise"
        if found
        else "no smaller one fits: take a smaller width or another layer, in another folder"
    )
    if source.views is None:
        other += ", or with kept views (views), whose passes have a size of their own (pass_size)"
    return ValueError(
        f"batch_size {batch_size} goes beyond the device's memory. {other}; or resume with it as it is under "
        "torchrun, where every process takes a part of each batch, or on a larger device: whole epochs stay"
    )


def training_step(model: DiffC, source: GridSource, size: int) -> Tensor:
    """The loss of a training step of so many images, which leaves the model and random state as they are."""
    device, images = next(model.parameters()).device, len(source.ids)
    twin = deepcopy(model).train()
    twin.dropout.p = 0.0
    grids = torch.zeros(size, *source.shape)
    if source.views is None:  # the backbone makes them in between
        grids = source.grids([place % images for place in range(size)], PLAIN)
    with fixed_order(device):
        logits = twin(grids.to(device))
        loss = F.cross_entropy(logits, logits.argmax(1))
        loss.backward()
    return loss.detach()


def passes_too_large(
    source: GridSource, pass_size: int, error: torch.OutOfMemoryError
) -> ValueError:
    """What to say of the backbone's passes that make kept views: how many images at once fit instead."""
    release(error)
    images = len(source.ids)

    def run(size: int) -> None:
        source.grids([place % images for place in range(size)], PLAIN)

    found = largest(reversed(smaller_sizes(pass_size)), run)
    if not found:
        return not_one_fits(0)
    return ValueError(
        f"pass_size {pass_size} goes beyond the device's memory: {found} fits; resume with pass_size "
        f"{found} (views that are whole in files stay)"
    )
