"""One training sample for people: text with the learnt parts marked, then a line a token.

<|im_start|>user
<image>
What is it?<|im_end|><|im_start|>assistant
⟦A cat.<|im_end|>⟧
"""

import sys
from typing import TYPE_CHECKING

from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX, IMAGE_TOKEN, ShowConfig
from llava_ext.language import load_tokenizer
from llava_ext.llava_json import Record, read_records
from llava_ext.templates import Encoded, encode_all
from revelio.wording import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def show(config: ShowConfig) -> str:
    """The sample that the config names, as text.

    Raises:
        ValueError: there is no such record, or it can't be masked.
    """
    data = config.data
    # The text needs no picture; where training leaves records without one out, the others' numbers change.
    files = config.cache is None and data.images is not None and data.images.is_dir()
    records = read_records(
        data.json, data.images, limit=config.limit, bad=config.bad_records, files=files
    )
    if not 0 <= config.index < len(records):
        raise ValueError(f"index is {config.index}: there are records 0 to {len(records) - 1}")
    record = records[config.index]
    tokenizer = load_tokenizer(config.model.language_model, config.model.revision)
    conversations = [(f"record {record.id!r}", record.turns)]
    model = config.model
    encoded = next(encode_all(tokenizer, model.template, conversations, model.system))
    if isinstance(encoded, ValueError):
        raise encoded
    colour = config.colour and sys.stdout.isatty()
    return describe(record, encoded, tokenizer, colour=colour)


def describe(
    record: Record,
    encoded: Encoded,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    colour: bool = False,
) -> str:
    """A header, the marked text, and position, id, learnt or not, and text of each token."""
    learnt = sum(label != IGNORE_INDEX for label in encoded.labels)
    header = (
        f"record {record.id!r}, images {', '.join(record.images) or 'none'}; "
        f"{plural(len(encoded.input_ids), 'token')} before images are expanded, {learnt} learnt"
    )
    rows = [
        f"{position:>5} {index:>8} {'learnt' if label != IGNORE_INDEX else '      '} "
        f"{_text(tokenizer, [index])!r}"
        for position, (index, label) in enumerate(
            zip(encoded.input_ids, encoded.labels, strict=True)
        )
    ]
    return "\n".join([header, "", marked(encoded, tokenizer, colour=colour), "", *rows])


def marked(encoded: Encoded, tokenizer: "PreTrainedTokenizerBase", *, colour: bool = False) -> str:
    """The text, learnt parts between brackets."""
    begin, end = (f"{GREEN}{OPEN}", f"{CLOSE}{PLAIN}") if colour else (OPEN, CLOSE)
    parts: list[str] = []
    start = 0
    flags = [label != IGNORE_INDEX for label in encoded.labels]
    for stop in range(1, len(flags) + 1):
        if stop == len(flags) or flags[stop] != flags[start]:
            text = _text(tokenizer, encoded.input_ids[start:stop])
            parts.append(f"{begin}{text}{end}" if flags[start] else text)
            start = stop
    return "".join(parts)


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """Tokens as text, images by their placeholder."""
    parts, rest = [], list(ids)
    while IMAGE_INDEX in rest:
        place = rest.index(IMAGE_INDEX)
        parts += [str(tokenizer.decode(rest[:place])), IMAGE_TOKEN]
        rest = rest[place + 1 :]
    return "".join([*parts, str(tokenizer.decode(rest))])
