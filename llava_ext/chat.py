"""A conversation in the terminal, as ``revelio llava chat`` holds it: pictures are looked at once."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

from PIL.Image import Image

from llava_ext.config import IMAGE_TOKEN, ChatConfig
from llava_ext.conversation import Turn
from llava_ext.generate import Assistant
from llava_ext.images import open_picture

PROMPT = "> "


class Dialogue:
    """One conversation about the same pictures, with all its turns.

    They are looked at at once; by towers whose prompt is the question, with the first one that is asked.
    """

    def __init__(self, assistant: Assistant, pictures: Sequence[Image], out: TextIO) -> None:
        self.assistant = assistant
        self.pictures = pictures
        self.asks = assistant.model.settings.asks
        self.grids = [] if self.asks else assistant.see(pictures)
        self.out = out
        self.turns: list[Turn] = []

    def ask(self, question: str, **settings: Any) -> str:
        """The answer, written out as it is made and remembered with its question.

        Args:
            question: of the user.
            settings: ``max_new_tokens``, ``temperature``, ``seed``; see :meth:`Assistant.reply`.

        Raises:
            ValueError: the conversation no longer fits; it is as it was before the question.
        """
        # The pictures belong to the first turn only.
        head = f"{IMAGE_TOKEN}\n" * len(self.pictures) if not self.turns else ""
        if self.asks and not self.turns:
            self.grids = self.assistant.see(self.pictures, [question.strip()] * len(self.pictures))
        turns = [*self.turns, Turn("user", head + question.strip())]
        (answer,) = self.assistant.reply(
            [turns],
            self.grids,
            **settings,
            on_text=self._show,
        )
        self._show(0, "\n")
        self.turns = [*turns, Turn("assistant", answer)]
        return answer

    def _show(self, _: int, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def chat(config: ChatConfig) -> None:
    """Answer ``config.question``, or every line of the terminal until it ends.

    Raises:
        KeyError: a tower's backbone is unknown here.
        ValueError: a picture or the model can't be read, or a question can't be answered.
    """
    pictures = [open_picture(path) for path in config.image]
    assistant = Assistant.load(
        config.model,
        device=config.device,
        dtype=config.dtype,
        towers=bool(pictures),
        allow=config.allow,
    )
    dialogue = Dialogue(assistant, pictures, sys.stdout)
    with _edits(config, assistant):
        _converse(config, dialogue)


def _edits(config: ChatConfig, assistant: Assistant) -> AbstractContextManager[None]:
    """The model as `edit` changes it."""
    if not config.edit:
        return nullcontext()
    from llava_ext.latents import edited, read_edits, read_ksaes

    return edited(assistant.model, read_edits(config.edit, read_ksaes(config.ksae)))


def _converse(config: ChatConfig, dialogue: Dialogue) -> None:
    if config.question is not None:
        dialogue.ask(config.question, **config.decoding())
        return
    while (line := _line()) not in (None, "exit"):
        if line == "new":
            dialogue.turns = []
        elif line:
            try:
                dialogue.ask(line, **config.decoding())
            except ValueError as error:
                sys.stderr.write(f"{error}; `new` begins anew\n")


def _line() -> str | None:
    """The next line without outer blanks; None at the end of the input."""
    try:
        return input(PROMPT if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
