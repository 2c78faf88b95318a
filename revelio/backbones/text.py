"""Prompt embeddings of Stable Diffusion: each distinct text is encoded once and kept.

The released code re-encodes the prompt for every batch (SPEC K15, D14).
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from revelio.backbones.loading import reading
from revelio.backbones.source import Source
from revelio.trust import read_object

# 77 x 1024 values in float32 are 0.3 MB: the cache stays below 160 MB.
CACHE_TEXTS = 512
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


class PromptEncoder:
    """A frozen text encoder with a cache.

    Attributes:
        encoded: how many times the text encoder has run.
    """

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self.encoded = 0

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "b t c"]:
        """The last hidden states of ``texts``, padded and cut to the model's length (77 tokens)."""
        rows = {text: self._one(text) for text in dict.fromkeys(texts)}
        if len(rows) == 1:
            return rows[texts[0]].expand(len(texts), -1, -1)
        return torch.cat([rows[text] for text in texts])

    def _one(self, text: str) -> Float[Tensor, "1 t c"]:
        if text in self._cache:
            self._cache.move_to_end(text)
        else:
            # One at a time, so that an embedding can't depend on what it was batched with.
            self._cache[text] = self._run(text)
        found = self._cache[text]
        if len(self._cache) > CACHE_TEXTS:
            self._cache.popitem(last=False)
        return found

    @torch.no_grad()
    def _run(self, text: str) -> Float[Tensor, "1 t c"]:
        self.encoded += 1
        tokens = self._tokenizer(
            text,
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_tensors="pt",
        )
        # As in the diffusers pipeline: padding is attended to, unless the checkpoint says otherwise.
        mask = tokens.attention_mask if self._uses_mask() else None
        device = self._model.device
        return self._model(
            tokens.input_ids.to(device), attention_mask=None if mask is None else mask.to(device)
        ).last_hidden_state

    def _uses_mask(self) -> bool:
        return bool(self._model.config.to_dict().get("use_attention_mask", False))


def load_clip_tokenizer(source: Source, part: str, words: int) -> CLIPTokenizer:
    """CLIP's tokenizer out of a model's folder or subfolder.

    Args:
        source: the model.
        part: the subfolder; "" for the model's own.
        words: rows of the text encoder's embedding.

    Raises:
        ValueError: files are missing or broken, or it has another number of words.
    """
    prefix = f"{part}/" if part else ""
    names = {name: source.file(prefix + name) for name in TOKENIZER_FILES}
    whole = names["tokenizer.json"] or (names["vocab.json"] and names["merges.txt"])
    config = names["tokenizer_config.json"]
    # transformers makes an empty tokenizer where the words are missing, and takes other special tokens
    # where the config is.
    if not whole or not config:
        raise ValueError(
            f"{source.name} has no whole tokenizer{f' in {part}' if part else ''}: it needs "
            f"tokenizer_config.json, and tokenizer.json or vocab.json with merges.txt"
        )
    for name, file in names.items():
        if file is not None and name.endswith(".json"):
            read_object(file)
    with reading(f"the tokenizer of {source.name} ({config.parent.name})"):
        tokenizer = CLIPTokenizer.from_pretrained(str(config.parent))
    if len(tokenizer) != words:
        raise ValueError(
            f"the tokenizer of {source.name} has {len(tokenizer)} words, its text encoder {words}: they "
            "belong to different models"
        )
    return tokenizer
