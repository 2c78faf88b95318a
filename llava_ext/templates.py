"""Chat templates: turns -> token ids, with labels only on the assistant's text and its closing tag.

The rule that keeps masking honest: the ids of every beginning of a conversation that ends where learned
and unlearned text meet must begin the ids of the whole. Then each token is wholly learned or wholly not, and
a prompt at inference has the ids that it had in training. A conversation that breaks it is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX
from llava_ext.conversation import PLACEHOLDER, STYLES, Segment, Turn, place_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer"
TEMPLATES = (*STYLES, TOKENIZER)


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model takes it.

    Attributes:
        input_ids: token ids; ``IMAGE_INDEX`` stands for one image.
        labels: the same where it is learned, ``IGNORE_INDEX`` elsewhere.
    """

    input_ids: list[int]
    labels: list[int]


def render(
    template: str,
    turns: Sequence[Turn],
    system: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> list[Segment]:
    """A conversation as text, in pieces that are learned or not.

    Args:
        template: one of ``TEMPLATES``.
        turns: user and assistant by turns, the user first.
        system: the system message; None is the template's own, "" none.
        tokenizer: whose chat template the template ``tokenizer`` uses.

    Raises:
        ValueError: the template is unknown, roles don't alternate, or a text holds a tag.
    """
    check_template(template, tokenizer)
    _check_roles(turns)
    placed = [
        Turn(turn.role, place_images(turn.text) if turn.role == "user" else turn.text.strip())
        for turn in turns
    ]
    if template == TOKENIZER:
        assert tokenizer is not None
        tags = {str(tag) for tag in tokenizer.all_special_tokens} - {PLACEHOLDER}
        _check_tags(placed, sorted(tags))
        return _by_tokenizer(tokenizer, placed, system)
    style = STYLES[template]
    _check_tags(placed, style.tags)
    return style.render(placed, style.system if system is None else system)


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    turns: Sequence[Turn],
    system: str | None = None,
) -> Encoded:
    """A whole conversation as ids and labels.

    Raises:
        ValueError: as :func:`render`; or a token covers learned and unlearned text, so that the
            masking can't be consistent.
    """
    segments = _merge(render(template, turns, system, tokenizer))
    bos = _bos(tokenizer, template)
    starts = list(accumulate((part.text for part in segments), initial=""))
    whole = bos + token_ids(tokenizer, starts[-1])
    labels: list[int] = [IGNORE_INDEX] * len(bos)
    for segment, text in zip(segments, starts[1:], strict=True):
        ids = whole if text == starts[-1] else bos + token_ids(tokenizer, text)
        if ids != whole[: len(ids)] or len(ids) < len(labels):
            raise ValueError(_straddles(tokenizer, template, whole, ids))
        learned = whole[len(labels) : len(ids)]
        labels += learned if segment.learned else [IGNORE_INDEX] * len(learned)
    assert len(labels) == len(whole)
    return Encoded(whole, labels)


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    turns: Sequence[Turn],
    system: str | None = None,
) -> list[int]:
    """The ids of a conversation that ends with the user's turn, ready for the assistant's.

    Raises:
        ValueError: as :func:`render`; or the last turn is the assistant's.
    """
    if not turns or turns[-1].role != "user":
        raise ValueError("a prompt must end with the user's turn")
    text = "".join(part.text for part in render(template, turns, system, tokenizer))
    return _bos(tokenizer, template) + token_ids(tokenizer, text)


def stop_strings(template: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> list[str]:
    """What ends an answer; ``tokenizer`` is needed for the template of that name.

    Raises:
        ValueError: the template is unknown, or the tokenizer has no chat template.
    """
    check_template(template, tokenizer)
    if template != TOKENIZER:
        return [STYLES[template].stop]
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    learned = [part.text for part in render(template, turns, None, tokenizer) if part.learned]
    return [stop] if (stop := learned[-1].removeprefix("b")) else []


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one kind as one: only where the kind changes must tokens end."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].learned == segment.learned:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.learned)
        elif segment.text:
            merged.append(segment)
    return merged


def token_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text without added tokens; each ``<image>`` becomes ``IMAGE_INDEX``."""
    ids: list[int] = []
    for number, piece in enumerate(text.split(PLACEHOLDER)):
        ids += [IMAGE_INDEX] if number else []
        ids += tokenizer(piece, add_special_tokens=False).input_ids if piece else []
    return ids


def check_template(template: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> None:
    """See whether there is such a template, and whether the tokenizer has one of its own.

    Raises:
        ValueError: it is unknown, or is ``tokenizer`` and the tokenizer has none.
    """
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}: choose from {', '.join(TEMPLATES)}")
    if template == TOKENIZER and (tokenizer is None or not tokenizer.chat_template):
        raise ValueError(
            "template `tokenizer` needs a tokenizer with a chat template, which this one lacks: "
            f"choose from {', '.join(STYLES)}"
        )


def _by_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], system: str | None
) -> list[Segment]:
    """Segments by the tokenizer's own chat template, found as what each turn adds to the text."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    segments: list[Segment] = []
    done = ""
    for turn in turns:
        messages = [*messages, {"role": turn.role, "content": turn.text}]
        opening = turn.role == "user"
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
        )
        added = text.removeprefix(done)
        if not text.startswith(done) or (not opening and not added.startswith(turn.text)):
            raise ValueError(
                "the tokenizer's chat template changes earlier turns or the answer itself, so what "
                f"is learned can't be told: choose from {', '.join(STYLES)}"
            )
        segments += [Segment(added, False)] if opening else _learned(added)
        done = text
    return segments


def _learned(added: str) -> list[Segment]:
    """The answer and its closing tag; the newline after the tag belongs to nobody."""
    tail = added[len(added.rstrip()) :]
    return [Segment(added.removesuffix(tail) if tail else added, True), Segment(tail, False)]


def _bos(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[int]:
    """The token that the tokenizer begins a text with, which chat templates write themselves."""
    if template == TOKENIZER or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id in tokenizer("").input_ids else []


def _check_roles(turns: Sequence[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if not turns or any(role != ("user", "assistant")[n % 2] for n, role in enumerate(roles)):
        raise ValueError(f"turns must be user, assistant, user, ... by turns, not {roles}")


def _check_tags(turns: Sequence[Turn], tags: Sequence[str]) -> None:
    for turn in turns:
        for tag in tags:
            if tag in turn.text:
                raise ValueError(f"a turn of the {turn.role} holds the template's own tag {tag!r}")


def _straddles(
    tokenizer: "PreTrainedTokenizerBase", template: str, whole: list[int], ids: list[int]
) -> str:
    same = 0
    while same < min(len(ids), len(whole)) and ids[same] == whole[same]:
        same += 1
    tokens = tokenizer.convert_ids_to_tokens([i for i in whole[same : same + 1] if i >= 0])
    return (
        f"template {template!r} can't be masked with this tokenizer: token {tokens} near position "
        f"{same} covers learned and unlearned text; choose a template whose tags it knows"
    )
