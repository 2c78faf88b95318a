"""Chat templates: turns -> token ids, with labels only on the assistant's text and its closing tag.

The rule that keeps masking honest: the ids of every beginning of a conversation that ends where learned
and unlearned text meet must begin the ids of the whole. Then each token is wholly learned or wholly not, and
a prompt at inference has the ids that it had in training. A conversation that breaks it is an error.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, TypeVar

from llava_ext.bounded import TooLong
from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX, IMAGE_TOKEN
from llava_ext.conversation import STYLES, Segment, Turn, by_tokenizer, check_text, place_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

TOKENIZER = "tokenizer"
TEMPLATES = (*STYLES, TOKENIZER)
# Conversations a call of the tokenizer: one call each would take most of the time.
ENCODE_TOGETHER = 500


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
        ValueError: the template is unknown, roles don't alternate, or a text holds a tag or is no
                UTF-8.
    """
    check_template(template, tokenizer)
    _check_roles(turns)
    for turn in turns:
        check_text(turn.text)
    placed = [
        Turn(turn.role, place_images(turn.text) if turn.role == "user" else turn.text.strip())
        for turn in turns
    ]
    if template == TOKENIZER:
        assert tokenizer is not None
        tags = {str(tag) for tag in tokenizer.all_special_tokens} - {IMAGE_TOKEN}
        _check_tags(placed, sorted(tags))
        return by_tokenizer(tokenizer, placed, system)
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
    found = next(encode_all(tokenizer, template, [("", turns)], system))
    if isinstance(found, ValueError):
        raise found
    return found


def encode_all(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    conversations: Iterable[tuple[str, Sequence[Turn]]],
    system: str | None = None,
) -> Iterator[Encoded | ValueError]:
    """Many conversations, several hundred at a time through the tokenizer.

    One that can't be masked is an error in its place, so that the others are still seen.

    Args:
        tokenizer: of the language model.
        template: one of ``TEMPLATES``.
        conversations: what messages call each, and its turns.
        system: see :func:`render`.

    Yields:
        What each became, or the error of :func:`encode`, which begins with what the conversation is called.

    Raises:
        ValueError: the template fits no conversation: it is unknown, or runs without an end.
    """
    check_template(template, tokenizer)
    bos = _bos(tokenizer, template)
    for some in _batched(conversations, ENCODE_TOGETHER):
        rendered = [_rendered(name, template, turns, system, tokenizer) for name, turns in some]
        texts = [
            text
            for segments in rendered
            if not isinstance(segments, ValueError)
            for text in accumulate(part.text for part in segments)
        ]
        found = iter(_all_ids(tokenizer, texts))
        for (name, _), segments in zip(some, rendered, strict=True):
            if isinstance(segments, ValueError):
                yield segments
                continue
            ids = [bos + next(found) for _ in segments]
            try:
                yield Encoded(ids[-1], _labels(tokenizer, template, segments, ids))
            except ValueError as error:
                yield _named(name, error)


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
    return prompt_ids(tokenizer, template, text)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", template: str, text: str) -> list[int]:
    """The ids of a rendered prompt; each ``<image>`` becomes ``IMAGE_INDEX``."""
    return _bos(tokenizer, template) + _all_ids(tokenizer, [text])[0]


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
    learned = [number for number, segment in enumerate(segments) if segment.learned]
    if not learned:
        raise ValueError("nothing is learnt: the assistant has no turn")
    # What follows the last learned text (a newline, in ChatML) teaches nothing and costs a token.
    for segment in segments[: learned[-1] + 1]:
        if merged and merged[-1].learned == segment.learned:
            merged[-1] = Segment(merged[-1].text + segment.text, segment.learned)
        elif segment.text:
            merged.append(segment)
    return merged


def _labels(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    segments: Sequence[Segment],
    beginnings: Sequence[list[int]],
) -> list[int]:
    """Labels of the whole, given the ids of the text up to the end of each segment."""
    whole = beginnings[-1]
    labels: list[int] = []
    for segment, ids in zip(segments, beginnings, strict=True):
        if ids != whole[: len(ids)]:
            raise ValueError(_straddles(tokenizer, template, whole, ids))
        new = whole[len(labels) : len(ids)]
        labels += new if segment.learned else [IGNORE_INDEX] * len(new)
    return labels


def _all_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts without added tokens; each ``<image>`` becomes ``IMAGE_INDEX``."""
    pieces = [text.split(IMAGE_TOKEN) for text in texts]
    flat = [piece for row in pieces for piece in row if piece]
    found: Any = tokenizer(flat, add_special_tokens=False).input_ids if flat else []
    ids = iter(found)
    rows = []
    for row in pieces:
        joined: list[int] = []
        for number, piece in enumerate(row):
            joined += [IMAGE_INDEX] if number else []
            joined += next(ids) if piece else []
        rows.append(joined)
    return rows


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items; the last may be shorter."""
    source = iter(items)
    while some := list(islice(source, size)):
        yield some


def _rendered(
    name: str,
    template: str,
    turns: Sequence[Turn],
    system: str | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> list[Segment] | ValueError:
    """A conversation in pieces, or why it has none."""
    try:
        return _merge(render(template, turns, system, tokenizer))
    except ValueError as error:
        if isinstance(error.__cause__, TooLong | MemoryError):
            raise _named(name, error) from error  # each of the others would take as long
        return _named(name, error)


def _named(name: str, error: ValueError) -> ValueError:
    """The error, its message begun with what the conversation is called."""
    return ValueError(f"{name}: {error}") if name else error


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


def _bos(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[int]:
    """The token that the tokenizer begins a text with, which chat templates write themselves."""
    bos: Any = tokenizer.bos_token_id
    return [bos] if template != TOKENIZER and bos in tokenizer("").input_ids else []


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
