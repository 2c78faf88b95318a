"""A conversation in the terminal, as ``revelio llava chat`` holds it: pictures are looked at once."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from typing import Any, TextIO

from PIL.Image import Image

from llava_ext.asked import question_of
from llava_ext.config import IMAGE_TOKEN, ChatConfig
from llava_ext.conversation import Turn, check_placed, place_images
from llava_ext.generate import Assistant
from llava_ext.images import open_picture
from revelio.trust import printable

PROMPT = "> "
ENDS = ("exit", "quit")
HINT = "`new` forgets the conversation, Ctrl-C stops an answer, `exit` or Ctrl-D ends\n"


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
            ValueError: the conversation no longer fits, or its pictures and ``<image>`` don't; it is as it
                was before the question, as it is when the answer is interrupted.
        """
        placed = self._placed(question)
        if self.asks and not self.turns:
            asked = [question_of(placed)] * len(self.pictures)
            self.grids = self.assistant.see(self.pictures, asked)
        turns = [*self.turns, Turn("user", placed)]
        (answer,) = self.assistant.reply(
            [turns],
            self.grids,
            **settings,
            on_text=self._show,
        )
        self._show(0, "\n")
        self.turns = [*turns, Turn("assistant", answer)]
        return answer

    def _placed(self, question: str) -> str:
        """The user's turn: the pictures belong to the first one only."""
        if not self.turns:
            placed = place_images(question, len(self.pictures))
            check_placed("the question", placed.count(IMAGE_TOKEN), len(self.pictures))
            return placed
        if IMAGE_TOKEN in question:
            raise ValueError(
                f"the question has {IMAGE_TOKEN}, but pictures stand in a conversation's first question "
                "only: take it out"
            )
        return question.strip()

    def _show(self, _: int, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def chat(config: ChatConfig) -> None:
    """Answer ``config.question``, or every line of the standard input until it ends.

    In a terminal a question that can't be answered, or whose answer is interrupted, is passed over. Elsewhere
    it ends the command: answers would no longer belong to the lines that they seem to.

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
    elif sys.stdin is not None and sys.stdin.isatty():
        _talk(config, dialogue)
    else:
        _read(config, dialogue)


def _talk(config: ChatConfig, dialogue: Dialogue) -> None:
    """Answer what is typed; no mistake and no Ctrl-C during an answer loses the conversation."""
    with suppress(ImportError):
        import readline  # noqa: F401  that `input` knows arrow keys and earlier lines
    sys.stderr.write(HINT)
    while (line := _typed()) not in (None, *ENDS):
        if line == "new":
            dialogue.turns = []
        elif line:
            try:
                dialogue.ask(line, **config.decoding())
            except ValueError as error:
                anew = "; `new` begins anew" if dialogue.turns else ""
                sys.stderr.write(f"{printable(error)}{anew}\n")
            except KeyboardInterrupt:
                sys.stderr.write("\nstopped: this question is not remembered\n")


def _typed() -> str | None:
    """The next line without outer blanks; None at the end of the input, none at all after Ctrl-C."""
    try:
        # Without a terminal to print on, the prompt would stand among the answers.
        return input(PROMPT if sys.stdout.isatty() else "").strip()
    except EOFError:
        sys.stderr.write("\n")  # the shell's prompt gets a line of its own
        return None
    except KeyboardInterrupt:  # it may have come just after an answer's end
        sys.stderr.write(f"\n{HINT}")
        return ""
    except UnicodeDecodeError as error:
        return error.object.decode(errors="surrogateescape").strip()  # refused as any such text


def _read(config: ChatConfig, dialogue: Dialogue) -> None:
    """Answer the lines of a file or a pipe.

    Raises:
        ValueError: one can't be answered; names it.
    """
    lines = iter(sys.stdin or ())
    for number in count(1):
        try:
            line = next(lines, ENDS[0]).strip()
            if line in ENDS:
                return
            if line == "new":
                dialogue.turns = []
            elif line:
                dialogue.ask(line, **config.decoding())
        except ValueError as error:
            raise ValueError(f"line {number} of the standard input: {error}") from error
