"""Records -> samples -> batches: ids, labels, and images, as pictures for the towers or as cached grids.

All conversations are encoded when the data set is made, so that a record that can't be masked, or is too
long once its images are expanded, is named before anything is trained.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from llava_ext.config import IGNORE_INDEX, ModelConfig
from llava_ext.images import image_id, open_picture
from llava_ext.llava_json import Record
from llava_ext.splice import expanded_length
from llava_ext.templates import encode_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_ext.towers import Tower


class ImageProvider(Protocol):
    """Where a sample's images come from: one image for an item, many for a batch."""

    def get(self, name: str) -> Any:
        """What one sample carries for the image called ``name``."""
        ...

    def stack(self, images: Sequence[Any]) -> Mapping[str, Any]:
        """Entries of a batch for all its images, in reading order; there may be none."""
        ...


class Pictures:
    """Images as the towers' pixels: the towers run in the training step."""

    def __init__(self, folder: Path, towers: "Sequence[Tower]") -> None:
        self.folder = folder
        self.towers = towers

    def get(self, name: str) -> tuple[tuple[torch.Tensor, ...], str]:
        """Pixels for each tower, and the id of the image's content.

        Raises:
            ValueError: the picture can't be read.
        """
        image = open_picture(self.folder / name)
        return tuple(tower.pixels(image) for tower in self.towers), image_id(image)

    def stack(self, images: Sequence[Any]) -> Mapping[str, Any]:
        """``pixels``, one tensor (i 3 h w) a tower, and ``image_ids``."""
        columns = zip(*(pixels for pixels, _ in images), strict=True)
        return {
            "pixels": tuple(torch.stack(column) for column in columns),
            "image_ids": [identity for _, identity in images],
        }


class Opened(Dataset):
    """Pictures by name, for a ``DataLoader`` whose workers read ahead."""

    def __init__(self, pictures: Pictures, names: Sequence[str]) -> None:
        self.pictures = pictures
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        return self.pictures.get(self.names[index])


class ConversationDataset(Dataset):
    """Encoded conversations; an item is a dict of ``input_ids``, ``labels``, ``images``, ``id``.

    Attributes:
        lengths: tokens of each sample with its images expanded.
        dropped: ids of the records left out for their length.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: "PreTrainedTokenizerBase",
        config: ModelConfig,
        image_tokens: int,
        images: ImageProvider,
        *,
        too_long: Literal["stop", "drop"] = "stop",
    ) -> None:
        """Encode and check every record.

        Args:
            records: from :func:`llava_ext.llava_json.read_records`.
            tokenizer: of the language model.
            config: names the template, the system message and ``max_length``.
            image_tokens: tokens an image is expanded to.
            images: where images come from.
            too_long: what a record beyond ``max_length`` does.

        Raises:
            ValueError: a record can't be masked or is too long; the message names it.
        """
        self.images = images
        self.lengths: list[int] = []
        self.dropped: list[str] = []
        self._records: list[Record] = []
        self._ids, self._learned, self._starts = array("i"), array("b"), [0]
        named = ((f"record {record.id!r}", record.turns) for record in records)
        encoded = encode_all(tokenizer, config.template, named, config.system)
        for record, sample in zip(records, encoded, strict=True):
            length = expanded_length(sample.input_ids, image_tokens)
            if length > config.max_length:
                if too_long == "stop":
                    raise ValueError(
                        f"record {record.id!r} has {length} tokens with its images expanded, "
                        f"`max_length` is {config.max_length}: raise it, give the towers fewer "
                        "tokens, or leave such records out (`too_long: drop`)"
                    )
                self.dropped.append(record.id)
                continue
            self._records.append(record)
            self.lengths.append(length)
            self._ids.extend(sample.input_ids)
            self._learned.extend(label != IGNORE_INDEX for label in sample.labels)
            self._starts.append(len(self._ids))
        if not self._records:
            raise ValueError(f"every record is longer than `max_length` {config.max_length}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, span = self._records[index], slice(self._starts[index], self._starts[index + 1])
        ids = torch.tensor(self._ids[span], dtype=torch.int64)
        learned = torch.tensor(self._learned[span], dtype=torch.bool)
        return {
            "input_ids": ids,
            "labels": torch.where(learned, ids, IGNORE_INDEX),
            "images": [self.images.get(name) for name in record.images],
            "id": record.id,
        }


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
            samples: what :class:`ConversationDataset` gives.
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
