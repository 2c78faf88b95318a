"""Samples -> a batch: ids padded to the longest, images of the whole batch in reading order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from llava_ext.config import IGNORE_INDEX
from llava_ext.splice import expanded_length


@dataclass(frozen=True)
class Collator:
    """Makes batches; what the images become is ``stack``'s business.

    Attributes:
        image_tokens: tokens an image is expanded to.
        pad_id: fills up ``input_ids``; masked, so that any id will do.
        stack: all images of a batch, in reading order -> entries of the batch (``grids``, or
            ``pixels`` and ``image_ids``).
        side: ``right`` for training, ``left`` for generation.
    """

    image_tokens: int
    pad_id: int
    stack: Callable[[Sequence[Any]], Mapping[str, Any]]
    side: Literal["left", "right"] = "right"

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of the model's inputs.

        Args:
            samples: what :class:`llava_ext.dataset.ConversationDataset` gives.
        """
        ids = [sample["input_ids"] for sample in samples]
        images = [image for sample in samples for image in sample["images"]]
        return {
            "input_ids": self._pad(ids, self.pad_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
            "labels": self._pad([sample["labels"] for sample in samples], IGNORE_INDEX),
            # Counted here, so that the model need not ask the device for it.
            "length": max(expanded_length(row.tolist(), self.image_tokens) for row in ids),
            **self.stack(images),
        }

    def _pad(self, rows: Sequence[Int64[Tensor, " l"]], value: int) -> Int64[Tensor, "b l"]:
        length = max(len(row) for row in rows)
        padded = torch.full((len(rows), length), value, dtype=torch.int64)
        for number, row in enumerate(rows):
            place = slice(length - len(row), None) if self.side == "left" else slice(len(row))
            padded[number, place] = row
        return padded
