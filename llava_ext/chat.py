"""A conversation in the terminal, as ``scripts/chat.py`` holds it: pictures are looked at once."""

import sys
from typing import TextIO

from torch import Tensor

from llava_ext.config import IMAGE_TOKEN
from llava_ext.conversation import Turn
from llava_ext.generate import Assistant
from llava_ext.images import open_picture
from llava_ext.options import ChatConfig

PROMPT = "> "


class Talk:
    """One conversation about the same pictures, with all its turns."""

    def __init__(
        self, assistant: Assistant, pictures: int, grids: list[Tensor], out: TextIO
    ) -> None:
        self.assistant = assistant
        self.pictures = pictures
        self.grids = grids
        self.out = out
        self.turns: list[Turn] = []

    def ask(self, question: str, *, max_new_tokens: int, temperature: float, seed: int) -> str:
        """The answer, written out as it is made and remembered with its question.

        Raises:
            ValueError: the conversation no longer fits; it is as it was before the question.
        """
        # The pictures belong to the first turn only.
        head = f"{IMAGE_TOKEN}\n" * self.pictures if not self.turns else ""
        turns = [*self.turns, Turn("user", head + question.strip())]
        (answer,) = self.assistant.reply(
            [turns],
            self.grids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_text=self._show,
        )
        self._show(0, "\n")
        self.turns = [*turns, Turn("assistant", answer)]
        return answer

    def _show(self, _: int, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def chat(flags: ChatConfig) -> None:
    """Answer ``flags.question``, or every line of the terminal until it ends.

    Raises:
        KeyError: a tower's backbone is unknown here.
        ValueError: a picture or the model can't be read, or a question can't be answered.
    """
    pictures = [open_picture(name) for name in flags.image]
    assistant = Assistant.load(
        flags.model,
        device=flags.device,
        dtype=flags.dtype,
        towers=bool(pictures),
        allow=flags.allow,
    )
    talk = Talk(assistant, len(pictures), assistant.see(pictures), sys.stdout)
    settings = {
        "max_new_tokens": flags.max_new_tokens,
        "temperature": flags.temperature,
        "seed": flags.seed,
    }
    if flags.question is not None:
        talk.ask(flags.question, **settings)
        return
    while (line := _line()) not in (None, "exit"):
        if line == "new":
            talk.turns = []
        elif line:
            try:
                talk.ask(line, **settings)
            except ValueError as error:
                sys.stderr.write(f"{error}; `new` begins anew\n")


def _line() -> str | None:
    """The next line without outer blanks; None at the end of the input."""
    try:
        return input(PROMPT if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
