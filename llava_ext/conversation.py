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


def _plain(turns: Sequence[Turn], system: str) -> list[Segment]:
    if len(turns) > 2:
        raise ValueError(
            f"template `plain` takes one question and its answer, not {len(turns)} turns: "
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
# The system messages of models saved in format 1, which had others where they named none.
FORMAT_1_SYSTEM = {
    "mpt": "A conversation between a user and an AI assistant that gives helpful and honest answers.",
    "llama_2": "You are an assistant that sees the user's images and helps with them in plain language.",
}


def by_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], system: str | None
) -> list[Segment]:
    """Segments by the tokenizer's own chat template, found as what each turn adds to the text.

    Raises:
        ValueError: the chat template changes what stands before a turn, or the answer.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    segments: list[Segment] = []
    done = ""
    for turn in turns:
        messages = [*messages, {"role": turn.role, "content": turn.text}]
        opening = turn.role == "user"
        text = _templated(tokenizer, messages, opening)
        added = text.removeprefix(done)
        if not text.startswith(done) or (not opening and not added.startswith(turn.text)):
            raise ValueError(
                "the tokenizer's chat template changes earlier turns or the answer itself, so what "
                f"is learned can't be told: choose from {', '.join(STYLES)}"
            )
        segments += [Segment(added, False)] if opening else _learned(added)
        done = text
    return segments


def _templated(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], opening: bool
) -> str:
    try:
        with bounded():
            made = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opening
            )
    except Exception as error:  # the template is a file's own program: it may fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the tokenizer's chat template can't be used ({printable(reason)[:200]}): choose from "
            f"{', '.join(STYLES)}"
        ) from error
    if len(made) > MOST_ADDED + MOST_REPEATED * sum(
        len(message["content"]) for message in messages
    ):
        raise ValueError(
            f"the tokenizer's chat template makes {len(made):,} characters of so short a conversation: "
            f"choose from {', '.join(STYLES)}"
        )
    return str(made)


def _learned(added: str) -> list[Segment]:
    """The answer and its closing tag; the newline after the tag belongs to nobody."""
    tail = added[len(added.rstrip()) :]
    return [Segment(added.removesuffix(tail) if tail else added, True), Segment(tail, False)]
