"""CLIP's text encoder in front of a denoiser: each distinct text is encoded once and kept.

Its blocks are layers of kind ``tokens``: read by :meth:`TextEncoder.activations`, edited by
:func:`~revelio.backbones.hooks.hooked`.

The released code re-encodes the prompt for every batch (SPEC K15, D14).
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from revelio.backbones.diffusion.conditioning import distinct
from revelio.backbones.hooks import as_activation, block_list, read_layers
from revelio.backbones.layers import Layers, check_layers, text_layers
from revelio.backbones.loading import LoadSettings, frozen, reading
from revelio.backbones.source import Source
from revelio.backbones.weights import TRANSFORMERS, read_weights, transformers_part
from revelio.trust import printable, read_object

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


class TextEncoder:
    """A frozen text encoder with a cache.

    Attributes:
        layers: its blocks, of kind ``tokens``.
        encoded: how many times the text encoder has run for :meth:`embed`.
    """

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel) -> None:
        self.layers: Layers = text_layers(model.config.to_dict())
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

    def distinct(self, texts: Sequence[str]) -> tuple[Float[Tensor, "u t c"], Int64[Tensor, " b"]]:
        """The embedding of each distinct text once, and which of them each text has."""
        once, rows = distinct(texts)
        return self.embed(once), rows

    def activations(
        self, texts: Sequence[str], layers: Sequence[str]
    ) -> dict[str, Float[Tensor, "b t d"]]:
        """The tokens of each text at some layers, all from one pass, in float32.

        Raises:
            KeyError: an unknown layer.
        """
        check_layers(self.layers, layers, "the text encoder")
        rows = [read_layers(self, layers, lambda text=text: self._run(text)) for text in texts]
        return {layer: as_activation(torch.cat([row[layer] for row in rows])) for layer in layers}

    def module(self, layer: str) -> nn.Module:
        """The block whose output is ``layer``. While a block is hooked no embedding is cached.

        Raises:
            KeyError: an unknown layer.
        """
        check_layers(self.layers, [layer], "the text encoder")
        return block_list(self._model)[int(layer.removeprefix("block"))]

    def parts(self) -> tuple[CLIPTextModel, CLIPTokenizer]:
        """The model and its tokenizer, for a pipeline."""
        return self._model, self._tokenizer

    def _one(self, text: str) -> Float[Tensor, "1 t c"]:
        if any(block._forward_hooks for block in block_list(self._model)):
            return self._run(text)
        if text in self._cache:
            self._cache.move_to_end(text)
        else:
            # One at a time, so that an embedding can't depend on what it was batched with.
            self.encoded += 1
            self._cache[text] = self._run(text)
        found = self._cache[text]
        if len(self._cache) > CACHE_TEXTS:
            self._cache.popitem(last=False)
        return found

    @torch.no_grad()
    def _run(self, text: str) -> Float[Tensor, "1 t c"]:
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


def load_text_encoder(source: Source, settings: LoadSettings, width: int) -> TextEncoder:
    """The CLIP text encoder of a pipeline, with its tokenizer.

    Args:
        source: the pipeline.
        settings: how to load it.
        width: channels of the text states that the denoiser takes.

    Raises:
        ValueError: a part is missing, unreadable, or does not fit the others.
    """
    path = "text_encoder/config.json"
    entries = source.json(path)
    if entries.get("model_type") != "clip_text_model":
        found = printable(entries.get("model_type"))
        raise ValueError(f"{path} of {source.name} is of a {found}, not of a clip_text_model")
    source.check(path, entries, {})
    with reading(f"{path} of {source.name}"):
        config = CLIPTextConfig.from_dict(entries)
    if config.hidden_size != width:
        raise ValueError(
            f"the text encoder of {source.name} is {config.hidden_size} wide, its U-Net takes {width}: "
            "they belong to different models"
        )
    model = transformers_part(
        CLIPTextModel,
        config,
        read_weights(source, "text_encoder", TRANSFORMERS),
        dtype=settings.number_format,
        attn_implementation=settings.attention,
    )
    tokenizer = load_clip_tokenizer(source, "tokenizer", config.vocab_size)
    return TextEncoder(tokenizer, frozen(model, settings.place))
