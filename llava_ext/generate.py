"""Answers about pictures: a finished model, its towers, and a conversation.

    assistant = Assistant.load("runs/clip-sd/final")
    assistant.answer(["What is this?"], [[image]], max_new_tokens=64)

The language model's own ``generate`` runs from embeddings with a KV cache. Batches are padded on the left.
At temperature 0 an answer is the same alone, in a batch, and in every run: towers' noise is keyed by the
image's content (the released code draws it anew, SPEC L5). In bfloat16 a tie of rounding may still fall
otherwise in another batch; in float32 that was not seen.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from llava_ext.asked import question_of
from llava_ext.checkpoint import load_model
from llava_ext.config import IMAGE_INDEX, IMAGE_TOKEN
from llava_ext.conversation import Turn, check_placed, check_text, place_images
from llava_ext.decoding import (
    KeyedGumbel,
    OnText,
    TextOut,
    answer_text,
    draw_keys,
    end_ids,
    generation_config,
    shifted,
)
from llava_ext.language import context_length
from llava_ext.model import LlavaModel
from llava_ext.splice import expanded_length
from llava_ext.templates import encode_prompt, stop_strings
from llava_ext.towers import Tower, image_id, load_towers, look
from revelio.device_memory import placed
from revelio.distributed import device_of
from revelio.trust import printable
from revelio.wording import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Grids = Sequence[Float[Tensor, "i c h w"]]
BATCH = 8
FEWER = "take bfloat16 as its dtype"  # what makes a saved model smaller


class Assistant:
    """A model that answers; make one with :meth:`load`, or from parts.

    Attributes:
        model: in evaluation mode.
        tokenizer: the language model's.
        towers: none where only cached grids are used.
    """

    def __init__(
        self,
        model: LlavaModel,
        tokenizer: "PreTrainedTokenizerBase",
        towers: Sequence[Tower] = (),
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.towers = tuple(towers)
        self.stops = stop_strings(model.settings.template, tokenizer)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str | None = None,
        towers: bool = True,
        allow: Collection[str] = (),
    ) -> "Assistant":
        """A saved model with its towers.

        Args:
            path: the folder of a finished run, or a hub id.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
            dtype: of the model, instead of the one it was saved in.
            towers: whether to load them; without, only :meth:`answer_grids` works.
            allow: towers' backbones named ``module:function`` that may be imported and run.

        Raises:
            KeyError: a tower's backbone is unknown here.
            ValueError: it is no such folder, or something it names can't be loaded, or goes beyond the
                device's memory.
        """
        place = device_of(device)
        model, tokenizer = load_model(path, dtype=dtype)
        known = model.config.transforms
        loaded = load_towers(model.settings, device, allow, known) if towers else ()
        return cls(
            placed(model, place, f"the model at {printable(path)}", FEWER), tokenizer, loaded
        )

    def answer(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        *,
        batch_size: int = BATCH,
        on_text: OnText | None = None,
        **settings: Any,
    ) -> list[str]:
        """Answer questions about their pictures.

        Args:
            prompts: one a question; where it has no ``<image>``, its pictures come first.
            images: RGB pictures of each question; none for a question about none.
            batch_size: questions answered at a time.
            on_text: is given (question, new text) as it comes.
            settings: ``max_new_tokens``, ``temperature``, ``seed``; see :meth:`reply`.

        Raises:
            ValueError: placeholders and pictures don't match, or a prompt is too long; names the question.
        """
        if len(prompts) != len(images):
            raise ValueError(f"{plural(len(prompts), 'prompt')} but pictures for {len(images)}")
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            chosen = slice(start, start + batch_size)
            seen = [picture for each in images[chosen] for picture in each]
            ids = [image_id(picture) for picture in seen]
            asked = zip(prompts[chosen], images[chosen], strict=True)
            questions = [question_of(prompt) for prompt, some in asked for _ in some]
            report = None if on_text is None else shifted(on_text, start)
            answers += self.answer_grids(
                prompts[chosen],
                self.see(seen, questions),
                [len(each) for each in images[chosen]],
                keys=ids,
                on_text=report,
                **settings,
            )
        return answers

    def answer_grids(
        self, prompts: Sequence[str], grids: Grids, counts: Sequence[int], **settings: Any
    ) -> list[str]:
        """Answer one batch of questions about pictures whose grids are known.

        Args:
            prompts: one a question.
            grids: one tensor a tower: the pictures of all questions in order.
            counts: pictures of each question.
            settings: as for :meth:`reply`.

        Raises:
            ValueError: as :meth:`answer`.
        """
        conversations = []
        for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            text = place_images(prompt, count)
            check_placed(f"question {number + 1}", text.count(IMAGE_TOKEN), count)
            conversations.append([Turn("user", text)])
        return self.reply(conversations, grids, **settings)

    def see(
        self, images: Sequence[Image.Image], questions: Sequence[str] | None = None
    ) -> list[Tensor]:
        """The towers' grids of pictures, one tensor a tower.

        Args:
            images: the pictures.
            questions: what is asked about each; only towers whose prompt it is want it.

        Raises:
            ValueError: the towers weren't loaded, or a question is wanted or is no UTF-8.
        """
        if not images:
            return []
        for question in questions or ():
            check_text(question)
        if not self.towers:
            raise ValueError("the towers weren't loaded: load them to answer about pictures")
        ids = [image_id(image) for image in images]
        return [
            look(tower, torch.stack([tower.pixels(image) for image in images]), ids, questions)
            for tower in self.towers
        ]

    @torch.no_grad()
    def reply(
        self,
        conversations: Sequence[Sequence[Turn]],
        grids: Grids = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        keys: Sequence[str] = (),
        on_text: OnText | None = None,
    ) -> list[str]:
        """The assistant's next turn in each of several conversations.

        Args:
            conversations: turns, the last one the user's; images stand in them as ``<image>``.
            grids: one tensor a tower: the images in reading order over all conversations.
            max_new_tokens: of an answer; less where the language model's context ends before.
            temperature: 0 takes the likeliest token; above it tokens are drawn.
            seed: of the draws.
            keys: names of the images; draws are keyed by them and the text.
            on_text: is given (conversation, new text) as it comes.

        Raises:
            ValueError: a setting is out of range, or a prompt leaves no room for an answer.
        """
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                f"max_new_tokens {max_new_tokens}, temperature {temperature}: give 1 or more, 0 or more"
            )
        if not conversations:
            return []
        settings = self.model.settings
        prompts = [
            encode_prompt(self.tokenizer, settings.template, turns, settings.system)
            for turns in conversations
        ]
        found = self._embed(prompts, grids)
        room = self._room(prompts, max_new_tokens)
        named = self.model.generation_config.eos_token_id
        ends = end_ids(self.tokenizer, named, self.stops)
        tools: dict[str, Any] = {"tokenizer": self.tokenizer}
        if temperature > 0:
            tools["logits_processor"] = [KeyedGumbel(temperature, seed, draw_keys(prompts, keys))]
        if on_text is not None:
            tools["streamer"] = TextOut(lambda ids: self._text(ids, ends), self.stops, on_text)
        tokens = cast(Any, self.model).generate(
            inputs_embeds=found.embeddings,
            attention_mask=found.attention_mask,
            generation_config=generation_config(self.tokenizer, room, ends, self.stops),
            **tools,
        )
        return [self._text(row, ends) for row in tokens.tolist()]

    def _embed(self, prompts: Sequence[Sequence[int]], grids: Grids) -> Any:
        """Prompts of unequal length as one batch, padded on the left."""
        row = max(map(len, prompts))
        ids = torch.tensor([[0] * (row - len(each)) + list(each) for each in prompts])
        mask = torch.tensor([[0] * (row - len(each)) + [1] * len(each) for each in prompts])
        place = self.model.device
        return self.model.embed(ids.to(place), mask.to(place), None, grids, padding_side="left")

    def _room(self, prompts: Sequence[Sequence[int]], wanted: int) -> int:
        """How many tokens may be added to the longest prompt."""
        limit = context_length(self.model.config)
        lengths = [expanded_length(each, self.model.image_tokens) for each in prompts]
        if limit is None:
            return wanted
        if max(lengths) >= limit:
            number = lengths.index(max(lengths))
            images = list(prompts[number]).count(IMAGE_INDEX)
            raise ValueError(
                f"question {number + 1} takes {plural(lengths[number], 'token')} ({plural(images, 'image')} "
                f"of {self.model.image_tokens}), but the language model takes {limit}: shorten it"
            )
        return min(wanted, limit - max(lengths))

    def _text(self, tokens: Sequence[int], ends: Sequence[int]) -> str:
        return answer_text(self.tokenizer, tokens, ends, self.stops)
