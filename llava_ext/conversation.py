"""Conversations as text, in pieces that are learned or not: one function a chat format.

    mpt        <|im_start|>system\\n{system}<|im_end|><|im_start|>user\\n{text}<|im_end|>
               <|im_start|>assistant\\n [{text}<|im_end|>]          no newline between turns
    vicuna_v1  {system} USER: {text} ASSISTANT: [ {text}</s>]
    llama_2    [INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{text} [/INST] [ {text} </s>] <s>
    plain      {images} [{text}\\n]

What stands in square brackets is learned: the assistant's text and its closing tag. (The `mpt` form is
that of the paper's code, SPEC 3.4; all are LLaVA's, with its system messages, so that its checkpoints can be
used; `llava_llama_2` is `llama_2` with another system message.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from llava_ext.bounded import bounded
from llava_ext.config import IMAGE_TOKEN
from revelio.trust import printable
from revelio.wording import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Turn(NamedTuple):
    """What one side says; images stand in the text as ``<image>``."""

    role: Literal["user", "assistant"]
    text: str


class Segment(NamedTuple):
    """A piece of a rendered conversation."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Style:
    """A named chat format.

    Attributes:
        render: turns and system message -> segments; a last turn of the user is followed by the
            opening of the assistant's, ready for an answer.
        stop: ends an answer.
        tags: texts that no turn may hold, because they would end it.
        system: the system message where none is asked for.
    """

    render: Callable[[Sequence[Turn], str], list[Segment]]
    stop: str
    tags: tuple[str, ...]
    system: str


def place_images(text: str, images: int = 0) -> str:
    """The text of a user's turn with its images where the model expects them.

    A single placeholder moves to the front and is followed by a newline, as in LLaVA; several stay
    where they stand. ``images`` placeholders are put in front of a text that has none.
    """
    text = text.strip()
    if images and IMAGE_TOKEN not in text:
        return "\n".join([IMAGE_TOKEN] * images + [text]).strip()
    if text.count(IMAGE_TOKEN) != 1:
        return text
    rest = " ".join(part.strip() for part in text.split(IMAGE_TOKEN)).strip()
    return f"{IMAGE_TOKEN}\n{rest}".strip()


def check_text(text: str) -> None:
    """Refuse what no tokenizer takes: bytes of another encoding, or half of a character's pair.

    Raises:
        ValueError: the text holds such a thing; shows where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 10) : error.start + 10]
        raise ValueError(f"the text is no UTF-8 at {around!r}: write it in UTF-8") from error


def check_placed(where: str, placeholders: int, pictures: int, give: str = "give") -> None:
    """Refuse a text that has not as many ``<image>`` as pictures.

    Args:
        where: whose text it is, as the message begins.
        placeholders: how many ``<image>`` the text has.
        pictures: how many pictures come with it.
        give: what a user does to add a picture.

    Raises:
        ValueError: they differ; says which of the two is lacking, and what to do.
    """
    if placeholders == pictures:
        return
    shown = f"{placeholders or 'no'} {IMAGE_TOKEN} in its text"
    if placeholders < pictures:
        raise ValueError(
            f"{where} has {plural(pictures, 'picture')} but {shown}: put one {IMAGE_TOKEN} into the text for "
            "each picture"
        )
    raise ValueError(
        f"{where} has {shown} but {plural(pictures, 'picture') if pictures else 'no picture'}: "
        f"{give} one picture for each {IMAGE_TOKEN}, or take {IMAGE_TOKEN} out"
    )


def _plain(turns: Sequence[Turn], system: str) -> list[Segment]:
    if len(turns) > 2:
        raise ValueError(
            f"template `plain` takes one question and its answer, not {plural(len(turns), 'turn')}: "
            "choose another template"
        )
    # Only the image is kept of the question: stage 1 learns to caption, not to follow requests.
    segments = [Segment(IMAGE_TOKEN * turns[0].text.count(IMAGE_TOKEN), False)]
    return segments + [Segment(f"{turn.text}\n", True) for turn in turns[1:]]


def _mpt(turns: Sequence[Turn], system: str) -> list[Segment]:
    head = f"<|im_start|>system\n{system}<|im_end|>" if system else ""
    segments = []
    for turn in turns:
        if turn.role == "user":
            user = f"{head}<|im_start|>user\n{turn.text}<|im_end|>"
            segments.append(Segment(f"{user}<|im_start|>assistant\n", False))
            head = ""
        else:
            segments.append(Segment(f"{turn.text}<|im_end|>", True))
    return segments


def _vicuna(turns: Sequence[Turn], system: str) -> list[Segment]:
    head = f"{system} " if system else ""
    segments = []
    for turn in turns:
        if turn.role == "user":
            segments.append(Segment(f"{head}USER: {turn.text} ASSISTANT:", False))
            head = ""
        else:
            # The space belongs to the answer: tokenizers join it to the word that follows.
            segments.append(Segment(f" {turn.text}</s>", True))
    return segments


def _llama(turns: Sequence[Turn], system: str) -> list[Segment]:
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    segments = []
    for number, turn in enumerate(turns):
        if turn.role == "user":
            begin = "<s>" if number else ""  # the first one is the tokenizer's own
            segments.append(Segment(f"{begin}[INST] {head}{turn.text} [/INST]", False))
            head = ""
        else:
            segments.append(Segment(f" {turn.text} </s>", True))
    return segments


STYLES = {
    "plain": Style(_plain, "\n", (), ""),
    "mpt": Style(
        _mpt,
        "<|im_end|>",
        ("<|im_start|>", "<|im_end|>"),
        "A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers.",
    ),
    "vicuna_v1": Style(
        _vicuna,
        "</s>",
        ("</s>",),
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "llama_2": Style(
        _llama,
        "</s>",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        # Two spaces after "safe." as there.
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
        "being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
        "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive "
        "in nature.\n\nIf a question does not make any sense, or is not factually coherent, explain why "
        "instead of answering something not correct. If you don't know the answer to a question, please "
        "don't share false information.",
    ),
    "llava_llama_2": Style(
        _llama,
        "</s>",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
    ),
}
# A chat template may add so many characters, and say each message so often.
MOST_ADDED, MOST_REPEATED = 1 << 20, 16
_CHANGES = (
    "the tokenizer's chat template changes earlier turns or the answer itself, so what is learned can't be "
    f"told: choose from {', '.join(STYLES)}"
)
# The system messages of models saved in format 1, which had others where they named none.
FORMAT_1_SYSTEM = {
    "mpt": "A conversation between a user and an AI assistant that gives helpful and honest answers.",
    "llama_2": "You are an assistant that sees the user's images and helps with them in plain language.",
}


def by_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], system: str | None
) -> list[Segment]:
    """Segments by the tokenizer's own chat template: what it puts around marks in the turns' place.

    A template may open an answer by more where it is the last: Qwen3 puts an empty `<think>` there, and none
    before earlier answers. Each is learnt as it stands in the whole conversation.

    Raises:
        ValueError: the chat template changes what stands before a turn, or a turn's text.
    """
    head = _system_message(tokenizer, system)
    marks = [Turn(turn.role, f"\ue000{number}\ue001") for number, turn in enumerate(turns)]
    beginnings = [marks[: number + 1] for number in range(len(turns))]
    *marked, made = _templated(tokenizer, head, [*beginnings, turns])
    frames = [_frame(*pair) for pair in zip(marked, beginnings, strict=True)]
    whole = frames[-1]
    texts = [turn.text for turn in turns]
    said = "".join(piece + text for piece, text in zip(whole, [*texts, ""], strict=True))
    if not all(_leads_to(own, whole) for own in frames) or said != made:
        raise ValueError(_CHANGES)
    segments: list[Segment] = []
    gap = whole[0]
    for turn, own, after in zip(turns, frames, whole[1:], strict=True):
        if turn.role == "user":
            gap += turn.text + after
            continue
        closing = own[-1].rstrip()  # the newline after the tag belongs to nobody
        segments += [Segment(gap, False), Segment(turn.text + closing, True)]
        gap = after.removeprefix(closing)
    return [*segments, Segment(gap, False)]


def _frame(rest: str, marks: Sequence[Turn]) -> list[str]:
    """What stands before, between and after the turns in the text that the template made of them.

    Raises:
        ValueError: a turn is missing, or is there twice.
    """
    pieces = []
    for mark in marks:
        before, _, after = rest.partition(mark.text)
        if rest.count(mark.text) != 1:
            raise ValueError(_CHANGES)
        pieces.append(before)
        rest = after
    return [*pieces, rest]


def _leads_to(own: list[str], whole: list[str]) -> bool:
    """Whether a conversation goes on as it began; answers before the last may be opened by less."""
    last = len(whole) - 2
    for place, (was, now) in enumerate(zip(own, whole, strict=False)):
        if place % 2 and place < last:
            same = was.startswith(now)
        elif place % 2 == 0 and place == len(own) - 1:  # the closing tag, then the next turn
            same = now.startswith(was)
        else:
            same = was == now
        if not same:
            return False
    return True


def _system_message(
    tokenizer: "PreTrainedTokenizerBase", system: str | None
) -> list[dict[str, str]]:
    """The message for a system text; "" is an empty one, which keeps a template's own away (Qwen2.5).

    A template that takes none at all, as Gemma's, gets none.
    """
    if system is None:
        return []
    message = [{"role": "system", "content": system}]
    if not system:
        try:
            _templated(tokenizer, message, [[Turn("user", "a")]])
        except ValueError:
            return []
    return message


def _templated(
    tokenizer: "PreTrainedTokenizerBase",
    head: list[dict[str, str]],
    conversations: Sequence[Sequence[Turn]],
) -> list[str]:
    """What the template makes of each conversation, all under one bound of time and memory."""
    found: list[str] = []
    asked = [
        [*head, *({"role": turn.role, "content": turn.text} for turn in turns)]
        for turns in conversations
    ]
    try:
        with bounded():
            for messages in asked:
                made = tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=messages[-1]["role"] == "user",
                    enable_thinking=False,  # LLaVA's answers have no thinking in them
                )
                found.append(str(made))
    except Exception as error:  # the template is a file's own program: it may fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the tokenizer's chat template can't be used ({printable(reason)[:200]}): choose from "
            f"{', '.join(STYLES)}"
        ) from error
    for messages, made in zip(asked, found, strict=True):
        length = sum(len(message["content"]) for message in messages)
        if len(made) > MOST_ADDED + MOST_REPEATED * length:
            raise ValueError(
                f"the tokenizer's chat template makes {plural(len(made), 'character')} of so short a "
                f"conversation: choose from {', '.join(STYLES)}"
            )
    return found
