"""A finished LLaVA model as lmms-eval asks one: conversations with pictures, answered in batches.

Answers are those of :class:`llava_ext.generate.Assistant`: at temperature 0 they do not depend on the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from llava_ext.asked import first_question
from llava_ext.conversation import Turn, place_images
from llava_ext.generate import Assistant
from llava_ext.processor import message_parts
from llava_ext.towers import image_id
from revelio.data.picture import as_rgb

LONGEST = 256  # new tokens, where a task doesn't say
PLAIN = {"num_beams": (None, 1), "top_p": (None, 0, 1, 0.0, 1.0), "top_k": (None, 0)}


class RevelioLlava(lmms):
    """The model that lmms-eval calls ``revelio_llava``."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        **settings: Any,
    ) -> None:
        """Load the model with its towers.

        Args:
            pretrained: the ``final`` folder of a run, or a hub id.
            batch_size: conversations answered at once.
            device: where it runs; under a launcher each process has its own.
            dtype: the number format it runs in; none: as it was saved.
            settings: of lmms-eval that are not for models like this, all of them None.

        Raises:
            ValueError: it is no such folder, or a setting is unknown.
        """
        super().__init__()
        unknown = [name for name, value in settings.items() if value not in (None, "")]
        if unknown:
            raise ValueError(f"revelio_llava takes no {unknown[0]}: give pretrained, device, dtype")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        own = str(self.accelerator.device) if self._world_size > 1 else device or "auto"
        self.assistant = Assistant.load(pretrained, device=own, dtype=dtype)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer a request, in their order; requests of equal settings share batches."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[2].items())), []).append(place)
        with tqdm(total=len(requests), unit="answer", disable=self.rank != 0) as bar:
            for places in groups.values():
                for start in range(0, len(places), self.batch_size):
                    part = places[start : start + self.batch_size]
                    found = self._answer([requests[place].args for place in part])
                    answers |= zip(part, found, strict=True)
                    bar.update(len(part))
        return [answers[place] for place in range(len(requests))]

    def _answer(self, asked: Sequence[tuple[Any, ...]]) -> list[str]:
        conversations, pictures, questions = [], [], []
        for _, to_messages, _, number, task, split in asked:
            turns, seen = conversation(to_messages(self.task_dict[task][split][number]))
            conversations.append(turns)
            pictures += [as_rgb(picture) for picture in seen]
            questions += [first_question(turns)] * len(seen)
        settings = asked[0][2]
        texts = self.assistant.reply(
            conversations,
            self.assistant.see(pictures, questions),
            keys=[image_id(picture) for picture in pictures],
            **decoding(settings),
        )
        return [cut(text, settings.get("until") or ()) for text in texts]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not to be had: lmms-eval's tasks with pictures ask for answers."""
        raise NotImplementedError("revelio_llava answers; it scores no given answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not to be had."""
        raise NotImplementedError("revelio_llava answers tasks of one round")


def conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Turn], list[Any]]:
    """A task's messages as turns, and their pictures.

    Raises:
        ValueError: there is a system message, which is the model's own, or something but texts and pictures.
    """
    turns, pictures = [], []
    for message in messages:
        kinds = {part["type"] for part in message["content"]} - {"text", "image"}
        if message["role"] == "system" or kinds:
            what = ", ".join(kinds) or "a system message"
            raise ValueError(
                f"the task has {what}: revelio_llava takes the user's texts and pictures"
            )
        said, seen = message_parts(message["content"])
        turns.append(Turn(message["role"], place_images(said, len(seen))))
        pictures += seen
    return turns, pictures


def decoding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings in the assistant's words.

    Raises:
        ValueError: beams or a cut of the distribution are asked for.
    """
    for name, plain in PLAIN.items():
        if settings.get(name) not in plain and settings.get("do_sample", True):
            raise ValueError(
                f"the task asks for {name} {settings[name]}, which revelio_llava has not"
            )
    draws = settings.get("do_sample", True)
    return {
        "max_new_tokens": settings.get("max_new_tokens") or LONGEST,
        "temperature": (settings.get("temperature") or 0.0) if draws else 0.0,
    }


def cut(text: str, ends: str | Sequence[str]) -> str:
    """A text up to the first of the ends."""
    for end in [ends] if isinstance(ends, str) else ends:
        text = text.split(end)[0] if end else text
    return text.strip()
