"""Files of a k-SAE whose latents are spread over processes: those of a whole one.

A tensor's rows stream through process 0 into one safetensors file, some thousand at a time, and each process
reads its own rows back. So a run may go on with another number of processes, or with one.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from revelio.sae.checkpoint import DTYPES
from revelio.sae.distributed import Group
from revelio.sae.model import KSparseAutoencoder
from revelio.tensor_files import read_rows

# Rows that travel at a time: 21 MB at the width 1,280.
CHUNK = 4096


def save_sharded(
    folder: Path | None,
    model: KSparseAutoencoder,
    group: Group,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write what ``save_pretrained`` would of the whole model; process 0 alone has a ``folder``."""
    tensors = {name: value.data for name, value in sorted(model.state_dict().items())}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(model.settings(), sort_keys=True, indent=2, allow_nan=False)
        (folder / "config.json").write_text(settings)
        model.generate_model_card(**(card or {})).save(folder / "README.md")
    ShardedFiles(group, model.n).save(folder and folder / "model.safetensors", tensors)


class ShardedFiles:
    """Reads and writes safetensors files of whole tensors that processes hold in parts.

    A tensor named after ``b_dec``, ``fired_at`` or ``threshold`` is whole on every process.

    Args:
        group: the processes.
        n: latents of all of them.
    """

    def __init__(self, group: Group, n: int) -> None:
        self.group, self.n = group, n

    def save(self, path: Path | None, tensors: Mapping[str, Tensor]) -> None:
        """Write one file; every process calls this, process 0 with a path."""
        if path is None:
            for name, tensor in tensors.items():
                self._stream(name, tensor, None)
            return
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in tensors.items():
            shape = self.shape(name, tensor)
            size = tensor.element_size() * int(torch.Size(shape).numel())
            offsets = [end, end + size]
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": offsets}
            end += size
        text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, tensor in tensors.items():
                self._stream(name, tensor, file)

    def load(self, path: Path, name: str, into: Tensor) -> None:
        """Fill this process's part of a tensor from a file."""
        share = range(len(into)) if _whole(name) else self.group.share(self.n)
        into.copy_(read_rows(path, name, share.start, share.stop))

    def shape(self, name: str, tensor: Tensor) -> list[int]:
        """The whole tensor's shape, of which this process holds a part."""
        return [len(tensor) if _whole(name) else self.n, *tensor.shape[1:]]

    def _stream(self, name: str, tensor: Tensor, file: Any) -> None:
        ranks = range(1 if _whole(name) else self.group.world)
        for rank in ranks:
            count = len(tensor) if _whole(name) else len(self.group.share_of(rank, self.n))
            for first in range(0, count, CHUNK):
                rows = min(CHUNK, count - first)
                part = (
                    tensor[first : first + rows].contiguous() if rank == self.group.rank else None
                )
                if rank == 0 and file is None:
                    continue
                if rank and rank == self.group.rank:
                    assert part is not None
                    dist.send(part, 0)
                elif rank and self.group.rank == 0:
                    part = tensor.new_empty(rows, *tensor.shape[1:])
                    dist.recv(part, rank)
                if file is not None:
                    assert part is not None
                    file.write(part.cpu().numpy().tobytes())


def _whole(name: str) -> bool:
    return name.startswith(("b_dec", "fired_at", "threshold"))
