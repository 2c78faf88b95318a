"""How batches reach a CUDA device, so that a step does not wait for them: the same ones, in the same order.

Rows that are held in memory and take no more than half of the device's free memory are moved there whole,
and batches are picked there. Others are read a batch ahead and copied from pinned memory on a stream of
their own, while the step before computes.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from revelio.sae.dataloader import Batches, Shuffled

# Of the free memory; the rest is for what steps make, whose size nobody knows here.
SHARE = 0.5


def fed(batches: Batches, device: torch.device) -> Batches:
    """What to train with on a device: the batches themselves on any but CUDA."""
    if device.type != "cuda":
        return batches
    if isinstance(batches, Shuffled) and isinstance(batches.rows, Tensor):
        rows = batches.rows
        if rows.device == device:
            return batches
        if rows.nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]:
            return batches.over(rows.to(device))
    return Overlapped(batches, device)


class _Sent(NamedTuple):
    batch: Tensor
    event: Any


class Overlapped:
    """Batches on a CUDA device, of which the next one is copied meanwhile.

    Args:
        batches: on the host, or wherever they are.
        device: where they are wanted.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def epoch(self, index: int) -> Iterator[Float[Tensor, "b d"]]:
        """The batches of an epoch, in their order."""
        lane, coming = torch.cuda.Stream(self.device), None
        for batch in self.batches.epoch(index):
            sent = self._send(batch, lane)
            if coming is not None:
                yield self._received(coming)
            coming = sent
        if coming is not None:
            yield self._received(coming)

    def _send(self, batch: Tensor, lane: torch.cuda.Stream) -> _Sent:
        with torch.cuda.stream(lane):
            # PyTorch keeps pinned memory for reuse until the copy out of it is done.
            held = batch.pin_memory() if batch.device.type == "cpu" else batch
            return _Sent(held.to(self.device, non_blocking=True), lane.record_event())

    def _received(self, sent: _Sent) -> Tensor:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(sent.event)
        # Its memory came from the other stream's: not to be given away before this one has read it.
        sent.batch.record_stream(stream)
        return sent.batch
