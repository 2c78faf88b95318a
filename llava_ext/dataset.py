"""Records -> samples -> batches: ids, labels, and images, as pictures for the towers or as cached grids.

All conversations are encoded when the data set is made, so that all records that can't be masked, or are too
long once their images are expanded, are named before anything is trained.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from jaxtyping import Bool, Int32, Int64
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from llava_ext.asked import first_question
from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX, ModelConfig
from llava_ext.images import image_id, open_picture
from llava_ext.llava_json import Bad, Record, refuse, report
from llava_ext.splice import expanded_length
from llava_ext.templates import encode_all
from revelio.data.contents import combined
from revelio.distributed import is_main
from revelio.files import write_whole_by
from revelio.run_dir import sha256
from revelio.tensor_files import read_tensors, tensor_headers
from revelio.trust import parse_json, printable
from revelio.wording import plural

TOKENS = "tokens.safetensors"
WRONG = "wrong"
MANY = 10_000  # records whose encoding takes long enough for a bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_ext.towers import Tower


class ImageProvider(Protocol):
    """Where a sample's images come from: one image for an item, many for a batch.

    Attributes:
        towers: what is run on a batch's ``pixels``; none where it has ``grids``.
    """

    towers: "Sequence[Tower]"

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


def _rules(tokenizer: "PreTrainedTokenizerBase") -> object:
    """What makes a text tokens: of a fast tokenizer merges and all, of another its files and words.

    What else a slow one does by itself shows in the tokens of a text.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        with TemporaryDirectory() as folder:
            files = sorted(map(Path, tokenizer.save_vocabulary(folder)))
            held = [(file.name, sha256(file)) for file in files]
        words = sorted(tokenizer.get_vocab().items())
        return type(tokenizer).__name__, held, words, tokenizer(PROBE).input_ids
    passing = ("padding", "truncation")  # of the last call
    return [
        pair
        for pair in parse_json(fast.to_str(), "the tokenizer").items()
        if pair[0] not in passing
    ]


# Blanks, cases, accents, digits, marks, an emoji, and words that merges make of several pieces.
PROBE = (
    "  The quick Fox's 1234 jumps--over\tthe \u00c4rger, na\u00efve (\u65e5\u672c) \U0001f436!\n\n"
    "What is unusual about this photograph? USER: <s> </s> ASSISTANT:"
)


@dataclass(frozen=True)
class EncodedRecords:
    """The tokens of all records, one behind the other; a file of them saves the next start from encoding.

    Attributes:
        key: a hash of the records, the tokenizer, the template and the system message.
        ids: of all records.
        learned: whether a token is.
        starts: where each record begins, and the end.
        wrong: by number, why a record can't be masked; it has no tokens.
    """

    key: str
    ids: Int32[Tensor, " n"]
    learned: Bool[Tensor, " n"]
    starts: Int64[Tensor, " r"]
    wrong: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def read_or_make(
        cls,
        path: Path | None,
        records: Sequence[Record],
        tokenizer: "PreTrainedTokenizerBase",
        config: ModelConfig,
    ) -> "EncodedRecords":
        """From the file where it holds these records, else by encoding them.

        Raises:
            ValueError: the template fits no record.
        """
        rules = _rules(tokenizer)
        settings = (rules, tokenizer.chat_template, config.template, config.system)
        key = combined([repr(settings), *(repr(record.turns) for record in records)])
        if path is not None and path.is_file():
            with suppress(ValueError):  # damaged: encoded anew
                held, about = tensor_headers(path)
                if about.get("key") == key:
                    return cls(key, **cls._read(path, held))
        return cls._make(key, records, tokenizer, config)

    @staticmethod
    def _read(path: Path, held: Iterable[str]) -> dict[str, Any]:
        names = ["ids", "learned", "starts", *({WRONG} & set(held))]
        found: dict[str, Any] = dict(read_tensors(path, dict.fromkeys(names)))
        found["learned"] = found["learned"].bool()
        if WRONG in found:
            said = parse_json(bytes(found[WRONG].tolist()).decode(), str(path))
            found[WRONG] = {int(number): why for number, why in said.items()}
        return found

    @classmethod
    def _make(
        cls, key: str, records: Sequence[Record], tokenizer: Any, config: ModelConfig
    ) -> "EncodedRecords":
        from tqdm import tqdm

        ids, learned, starts = array("i"), array("b"), array("q", [0])
        named = ((f"record {record.id!r}", record.turns) for record in records)
        encoded = encode_all(tokenizer, config.template, named, config.system)
        quiet = len(records) < MANY or not is_main()
        bar = tqdm(encoded, "tokens", len(records), disable=quiet, leave=False)
        wrong: dict[int, str] = {}
        for number, sample in enumerate(bar):
            if isinstance(sample, ValueError):
                wrong[number] = str(sample)
            else:
                ids.extend(sample.input_ids)
                learned.extend(label != IGNORE_INDEX for label in sample.labels)
            starts.append(len(ids))
        flags = torch.tensor(learned, dtype=torch.bool)
        return cls(key, torch.tensor(ids, dtype=torch.int32), flags, torch.tensor(starts), wrong)

    def save(self, path: Path) -> None:
        """Keep the tokens for the next start."""
        tensors = {"ids": self.ids, "learned": self.learned.to(torch.uint8), "starts": self.starts}
        if self.wrong:  # among the tensors: two texts of a header have no order
            said = json.dumps(self.wrong).encode()
            tensors[WRONG] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        write_whole_by(path, lambda place: save_file(tensors, place, {"key": self.key}))

    def lengths(self, image_tokens: int) -> list[int]:
        """Tokens of each record with its images expanded."""
        images = torch.cat(
            [torch.zeros(1, dtype=torch.int64), (self.ids == IMAGE_INDEX).cumsum(0)]
        )[self.starts]
        return (self.starts.diff() + images.diff() * (image_tokens - 1)).tolist()

    def sample(self, number: int) -> tuple[Int64[Tensor, " l"], Bool[Tensor, " l"]]:
        """Ids and what is learned of one record."""
        span = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.ids[span].long(), self.learned[span]


class ConversationDataset(Dataset):
    """Encoded conversations; an item is a dict of ``input_ids``, ``labels``, ``images``, ``id``.

    Attributes:
        records: of the samples.
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
        bad: Bad = "stop",
        kept: Path | None = None,
        source: Path | None = None,
    ) -> None:
        """Encode and check every record.

        Args:
            records: from :func:`llava_ext.llava_json.read_records`.
            tokenizer: of the language model.
            config: names the template, the system message and ``max_length``.
            image_tokens: tokens an image is expanded to.
            images: where images come from.
            too_long: what a record beyond ``max_length`` does.
            bad: what a record does that can't be masked: ``stop``, or be left out, with a warning that names
                all such.
            kept: a file of tokens that an earlier start may have left; see :class:`EncodedRecords`.
            source: the records' file, for messages.

        Raises:
            ValueError: records can't be masked or are too long, or all are; the message names them.
        """
        self.images = images
        self.encoded = EncodedRecords.read_or_make(kept, records, tokenizer, config)
        wrong = [(repr(records[number].id), why) for number, why in self.encoded.wrong.items()]
        refuse(wrong, len(records), bad, source)
        where = f"{printable(source)}: " if source else ""
        lengths = self.encoded.lengths(image_tokens)
        long = [number for number, length in enumerate(lengths) if length > config.max_length]
        if long and too_long == "stop":
            named = [(repr(records[number].id), lengths[number]) for number in long]
            said = [
                (name, f"record {name} has {plural(n, 'token')} with its images expanded")
                for name, n in named
            ]
            raise ValueError(
                f"{where}{report(said, len(records), 'too long')}, `max_length` is {config.max_length}: "
                "raise it, give the towers fewer tokens, or leave such records out (`too_long: drop`)"
            )
        self.dropped = [records[number].id for number in long]
        left_out = {*long, *self.encoded.wrong}
        self._numbers = [number for number in range(len(records)) if number not in left_out]
        self.lengths = [lengths[number] for number in self._numbers]
        self.records = [records[number] for number in self._numbers]
        if not self._numbers:
            others = " or can't be masked" if self.encoded.wrong else ""
            raise ValueError(
                f"{where}every record is longer than `max_length` {config.max_length}{others}"
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        ids, learned = self.encoded.sample(self._numbers[index])
        return {
            "input_ids": ids,
            "labels": torch.where(learned, ids, IGNORE_INDEX),
            "images": [self.images.get(name) for name in record.images],
            "questions": [first_question(record.turns)] * len(record.images),
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
        seen = dict(self.stack(images))
        if "pixels" in seen:  # the towers run on them
            seen["questions"] = [text for one in samples for text in one.get("questions", ())]
        return {
            "input_ids": self._pad(ids, self.pad_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
            "labels": self._pad([sample["labels"] for sample in samples], IGNORE_INDEX),
            # Counted here, so that the model need not ask the device for it.
            "length": max(expanded_length(row.tolist(), self.image_tokens) for row in ids),
            **seen,
        }

    def _pad(self, rows: Sequence[Int64[Tensor, " l"]], value: int) -> Int64[Tensor, "b l"]:
        length = max(len(row) for row in rows)
        padded = torch.full((len(rows), length), value, dtype=torch.int64)
        for number, row in enumerate(rows):
            place = slice(length - len(row), None) if self.side == "left" else slice(len(row))
            padded[number, place] = row
        return padded
