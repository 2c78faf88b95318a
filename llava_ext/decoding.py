"""What is handed to the language model's own ``generate``: keyed sampling, streaming of several answers.

Sampling is the Gumbel-max form: argmax(logits / temperature + g) with g = -log(-log(u)) is a draw from
softmax(logits / temperature). u is keyed by (seed, the question, step), so that an answer does not depend on
what else is in the batch, and no global random state is used.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.streamers import BaseStreamer

from llava_ext.config import IMAGE_INDEX
from revelio.seeds import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnText = Callable[[int, str], None]  # which question of the batch, and the new piece of its answer

UNFINISHED = "\ufffd"  # what a tokenizer gives for half a character


class KeyedGumbel(LogitsProcessor):
    """Make greedy search draw from the softmax at a temperature."""

    def __init__(self, temperature: float, seed: int, keys: Sequence[str]) -> None:
        self.temperature = temperature
        self.seed = seed
        self.keys = keys

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores whose largest is the token drawn."""
        step = input_ids.shape[1]
        drawn = [
            torch.rand(scores.shape[1], generator=generator(self.seed, "answer", key, step))
            for key in self.keys
        ]
        uniform = torch.stack(drawn).clamp_min(torch.finfo(torch.float32).tiny)
        gumbel = -torch.log(-torch.log(uniform))
        return scores.float() / self.temperature + gumbel.to(scores.device)


class TextOut(BaseStreamer):
    """Hand on each question's text as it grows, never a piece of a stop text or half a character."""

    def __init__(
        self, decode: Callable[[list[int]], str], stops: Sequence[str], out: OnText
    ) -> None:
        self.decode = decode
        self.stops = stops
        self.out = out
        self.tokens: list[list[int]] = []
        self.done: list[str] = []

    def put(self, value: Tensor) -> None:
        """The first call brings the prompt (no ids where embeddings were given), then one token a row."""
        if value.dim() == 2:
            self.tokens, self.done = [[] for _ in value], [""] * len(value)
            return
        for row, token in enumerate(value.tolist()):
            self.tokens[row].append(token)
            self._hand_on(row, self._settled(self.decode(self.tokens[row])))

    def end(self) -> None:
        """Hand on what was held back."""
        for row, tokens in enumerate(self.tokens):
            self._hand_on(row, self.decode(tokens))

    def _settled(self, text: str) -> str:
        """The part that later tokens can't change."""
        held = max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        text = text[: len(text) - held]
        # Blanks at the end go if nothing follows them.
        return "" if text.endswith(UNFINISHED) else text.rstrip()

    def _hand_on(self, row: int, text: str) -> None:
        if len(text) > len(self.done[row]):
            self.out(row, text[len(self.done[row]) :])
            self.done[row] = text


def answer_text(
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Sequence[int],
    ends: Sequence[int],
    stops: Sequence[str],
) -> str:
    """An answer's text: up to the first end token or stop text, without special tokens and outer blanks."""
    kept = list(tokens)
    for place, token in enumerate(kept):
        if token in ends:
            kept = kept[:place]
            break
    text = str(tokenizer.decode(kept))
    for stop in stops:
        text = text.split(stop)[0]
    for special in tokenizer.all_special_tokens:
        text = text.replace(special, "")
    return text.strip()


def end_ids(tokenizer: Any, named: Any, stops: Sequence[str]) -> list[int]:
    """Tokens that end an answer: the tokenizer's, those the model names, and stop texts that are tokens."""
    several = named if isinstance(named, list) else [named]
    special = [stop for stop in stops if stop in tokenizer.all_special_tokens]
    tokens = (*several, tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(special))
    return sorted({token for token in tokens if token is not None})


def generation_config(
    tokenizer: Any, room: int, ends: Sequence[int], stops: Sequence[str]
) -> GenerationConfig:
    """Greedy search over at most ``room`` new tokens; drawing is :class:`KeyedGumbel`'s."""
    return GenerationConfig(
        max_new_tokens=room,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(ends) or None,
        stop_strings=[stop for stop in stops if stop not in tokenizer.all_special_tokens] or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def draw_keys(prompts: Sequence[Sequence[int]], images: Sequence[str]) -> list[str]:
    """A name a question, of its text and its pictures' contents."""
    names, left = [], list(images)
    for prompt in prompts:
        count = list(prompt).count(IMAGE_INDEX)
        own, left = left[:count], left[count:]
        names.append(hashlib.blake2b(repr((list(prompt), own)).encode()).hexdigest())
    return names


def shifted(out: OnText, start: int) -> OnText:
    """Report on a part of the questions as if it were the whole."""
    return lambda row, text: out(start + row, text)


class WordsOnly(CandidateGenerator):
    """Drafts of a text without the tokens of its pictures, which only the model itself can read."""

    def __init__(self, drafts: CandidateGenerator, image_token: int) -> None:
        self.drafts = drafts
        self.image_token = image_token

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The text with the draft behind it, and the draft's logits where there are any."""
        words = input_ids[input_ids != self.image_token][None]
        found, logits = self.drafts.get_candidates(cast(Any, words), **kwargs)
        draft = found[:, words.shape[1] :].to(input_ids.device)
        return torch.cat([input_ids, draft], dim=1), logits

    def update_candidate_strategy(
        self, input_ids: Tensor, scores: Tensor, num_matches: int
    ) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tell how many tokens of the draft were right."""
        self.drafts.update_candidate_strategy(cast(Any, input_ids), cast(Any, scores), num_matches)


def drafts_from_words(
    make: Callable[..., CandidateGenerator],
    image_token: int,
    input_ids: Tensor,
    model_kwargs: Mapping[str, Any],
    *,
    generation_config: GenerationConfig,
    inputs_tensor: Tensor,
    **tools: Any,
) -> CandidateGenerator:
    """What drafts tokens for assisted generation: ``make``'s, on the words of a prompt.

    Args:
        make: of a language model, as transformers' ``generate`` calls it.
        image_token: stands for a token of a picture.
        input_ids: of one prompt.
        model_kwargs: of ``generate``; drafts need the mask only.
        generation_config: of ``generate``.
        inputs_tensor: the prompt again.
        tools: the assistant, tokenizers and logits processors.

    Raises:
        ValueError: the prompt came as embeddings, which hold no words.
    """
    if "inputs_embeds" in model_kwargs:
        raise ValueError(
            "an assistant reads the prompt's tokens: give `input_ids` instead of `inputs_embeds`"
        )
    words = input_ids[0] != image_token
    text, mask = input_ids[:, words], model_kwargs.get("attention_mask")
    shorter = deepcopy(generation_config)
    for name in ("max_length", "min_length"):
        setattr(shorter, name, max(0, getattr(shorter, name) - int((~words).sum())))
    drafts = make(
        generation_config=shorter,
        input_ids=text,
        inputs_tensor=text,
        model_kwargs={} if mask is None else {"attention_mask": mask[:, words]},
        **tools,
    )
    return WordsOnly(drafts, image_token)
