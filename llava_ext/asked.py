"""The question about a picture, which a tower may take as its prompt: found in a text, put into a tensor.

A processor's text is a whole prompt; what the user says first in it is the question, as in training.
On the way to the model questions are bytes in a row, each question's followed by ``END``: such rows can be
joined whatever their lengths, as a pipeline joins what it makes batches of.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from jaxtyping import UInt8
from torch import Tensor

from llava_ext.config import IMAGE_TOKEN
from llava_ext.conversation import Turn
from llava_ext.templates import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = 0xFF  # no byte of UTF-8
# In the place of what is said; no template changes them.
_SYSTEM, _QUESTION, _ANSWER = "\ue002", "\ue003", "\ue004"


def question_of(text: str) -> str:
    """What a user's turn asks, without its pictures."""
    return " ".join(part.strip() for part in text.split(IMAGE_TOKEN)).strip()


def first_question(turns: Sequence[Turn]) -> str:
    """What is asked first, which a tower may take as its prompt."""
    return question_of(turns[0].text)


def question_in(
    text: str,
    template: str,
    system: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> str:
    """The first question of a whole prompt.

    Args:
        text: of :func:`llava_ext.templates.render`, with any system message.
        template: of the conversation.
        system: the model's own system message.
        tokenizer: whose chat template the template ``tokenizer`` uses.

    Raises:
        ValueError: the text is none of the template's, or the template leaves questions out.
    """
    asked, answered = Turn("user", _QUESTION), Turn("assistant", _ANSWER)

    def pieces(system: str | None, *turns: Turn) -> tuple[str, str]:
        whole = "".join(part.text for part in render(template, turns, system, tokenizer))
        before, _, after = whole.partition(_QUESTION)
        return before, after

    opening, after = pieces(system, asked)
    between, _, _ = pieces(system, asked, answered)[1].partition(_ANSWER)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(after, between, strict=False))
    closing = "".join(one for one, _ in same)  # an answer that is asked for may be opened by more
    bare = _opening(pieces, "", asked)
    front, _, behind = _opening(pieces, _SYSTEM, asked).partition(_SYSTEM)
    rest = ""
    if opening != bare and text.startswith(opening):
        rest = text.removeprefix(opening)
    elif behind and text.startswith(front) and behind in text:  # another system message
        rest = text.partition(behind)[2]
    elif text.startswith(bare):
        rest = text.removeprefix(bare)
    if closing and closing in rest:
        return question_of(rest.partition(closing)[0])
    raise ValueError(
        f"the question can't be told from a text that is not of the template {template!r}, and a tower is "
        "prompted by it: give `questions`, one a text, or messages to `apply_chat_template`"
    )


def _opening(pieces: Callable[..., tuple[str, str]], system: str, asked: Turn) -> str:
    """What a prompt with a system message opens with; nothing where the template takes none."""
    try:
        return pieces(system, asked)[0]
    except ValueError:
        return ""


def join_questions(questions: Sequence[str]) -> UInt8[Tensor, " n"]:
    """Questions as bytes in a row."""
    parts = (question.encode(errors="replace") + bytes([END]) for question in questions)
    return torch.tensor(list(b"".join(parts)), dtype=torch.uint8)


def split_questions(found: UInt8[Tensor, " n"]) -> list[str]:
    """The questions that :func:`join_questions` made a row of."""
    return [part.decode() for part in bytes(found.tolist()).split(bytes([END]))[:-1]]
