"""What a denoiser is told beside the noised input and the timestep: text states, class labels, nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The inputs that a batch of prompts stands for; each distinct prompt has one row.

    Attributes:
        rows: which row of the inputs each image has, on the CPU.
        inputs: the denoiser's keyword arguments, each (u ...) with one row a distinct prompt; none for an
            unconditional model.
    """

    rows: Int64[Tensor, " b"]
    inputs: Mapping[str, Shaped[Tensor, "u ..."]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, images: Int64[Tensor, " a"]) -> "Conditioning":
        """The conditioning of the images at some places of the batch, in that order."""
        return Conditioning(self.rows[images.cpu()], self.inputs)

    def arguments(self) -> dict[str, Shaped[Tensor, "b ..."]]:
        """The denoiser's keyword arguments, one row an image."""
        return {name: self._expanded(table) for name, table in self.inputs.items()}

    def _expanded(self, table: Tensor) -> Tensor:
        if len(table) == 1:  # no copy, whatever the batch size
            return table.expand(len(self.rows), *table.shape[1:])
        return table[self.rows.to(table.device, non_blocking=True)]


def distinct(prompts: Sequence[str]) -> tuple[list[str], Int64[Tensor, " b"]]:
    """The distinct prompts in order of first use, and which of them each image has."""
    texts = list(dict.fromkeys(prompts))
    place = {text: row for row, text in enumerate(texts)}
    return texts, torch.tensor([place[prompt] for prompt in prompts], dtype=torch.long)
