"""Text encoders in front of a denoiser, CLIP's or T5's: each distinct text is encoded once and kept.

Their blocks are layers of kind ``tokens``: read by :meth:`TextEncoder.activations`, edited by
:func:`~revelio.backbones.hooks.hooked`.

The released code re-encodes the prompt for every batch (SPEC K15, D14).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from revelio.backbones.diffusion.conditioning import distinct
from revelio.backbones.hooks import as_activation, block_list, read_layers
from revelio.backbones.layers import Layers, check_layers, text_layers
from revelio.backbones.loading import LoadSettings, frozen, reading
from revelio.backbones.source import Source
from revelio.backbones.weights import TRANSFORMERS, read_weights, transformers_part
from revelio.trust import printable, read_object
from revelio.wording import plural

# The cache stays below 160 MB in float32: 512 texts of 77 x 1024 values, 32 of 300 x 4096.
CACHE_NUMBERS = 40_000_000
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
        width: channels of its states.
        encoded: how many times the text encoder has run for :meth:`embed` and :meth:`tables`.
    """

    def __init__(
        self,
        tokenizer: Any,
        model: PreTrainedModel,
        *,
        layer: str | None = None,
        pooled: str | None = None,
        length: int | None = None,
        prepare: Callable[[str], str] = str,
        masked: bool = False,
    ) -> None:
        """A tokenizer and a model of transformers.

        Args:
            tokenizer: its tokenizer.
            model: the model.
            layer: the block whose output the denoiser is told; None is the last hidden states, which are
                normalized.
            pooled: the field of the model's output that is kept as ``pooled`` (1 d); None is none.
            length: to which texts are padded and cut, in tokens; None is the most that both parts take.
            prepare: what is done to a text before it is cut into tokens.
            masked: whether padding is hidden from the encoder; the mask is then kept as ``mask`` (1 t).
        """
        self.width: int = model.config.hidden_size
        self.layers: Layers = text_layers(self.width, model.config.num_hidden_layers)
        self._tokenizer = tokenizer
        self._model = model
        self._layer = layer
        self._pooled = pooled
        self._length = length or min(
            tokenizer.model_max_length, model.config.max_position_embeddings
        )
        self._prepare = prepare
        self._masked = masked
        self._cache: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.encoded = 0

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "b t c"]:
        """The hidden states of ``texts``, padded and cut to the model's length (77 tokens of CLIP)."""
        rows = {text: self._one(text)["states"] for text in dict.fromkeys(texts)}
        if len(rows) == 1:
            return rows[texts[0]].expand(len(texts), -1, -1)
        return torch.cat([rows[text] for text in texts])

    def tables(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], Int64[Tensor, " b"]]:
        """All that the denoiser is told of each distinct text, once, and which of them each text is.

        Returns:
            ``states`` (u t c), and what else the encoder gives: ``pooled`` (u d), ``mask`` (u t).
        """
        once, rows = distinct(texts)
        found = [self._one(text) for text in once]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}, rows

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

    def parts(self) -> tuple[Any, Any]:
        """The model and its tokenizer, for a pipeline."""
        return self._model, self._tokenizer

    def _one(self, text: str) -> dict[str, Tensor]:
        if any(_changeable(block) for block in block_list(self._model)):
            return self._run(text)
        if text in self._cache:
            self._cache.move_to_end(text)
        else:
            # One at a time, so that an embedding can't depend on what it was batched with.
            self.encoded += 1
            self._cache[text] = self._run(text)
        found = self._cache[text]
        if len(self._cache) > 1 and len(self._cache) * found["states"].numel() > CACHE_NUMBERS:
            self._cache.popitem(last=False)
        return found

    @torch.no_grad()
    def _run(self, text: str) -> dict[str, Tensor]:
        tokens = self._tokenizer(
            self._prepare(text),
            padding="max_length",
            max_length=self._length,
            truncation=True,
            return_tensors="pt",
        ).to(self._model.device)
        # As in diffusers' pipelines: CLIP's padding is attended to, unless the checkpoint says otherwise.
        mask: Any = tokens.attention_mask if self._masked or self._uses_mask() else None
        outputs: list[Any] = []
        states = read_layers(
            self,
            [self._layer] if self._layer else [],
            lambda: outputs.append(self._model(tokens.input_ids, attention_mask=mask)),
        )
        told = {"states": states[self._layer] if self._layer else outputs[0].last_hidden_state}
        if self._pooled:
            told["pooled"] = outputs[0][self._pooled]
        return told | ({"mask": mask} if self._masked else {})

    def _uses_mask(self) -> bool:
        return bool(self._model.config.to_dict().get("use_attention_mask", False))


def _changeable(block: nn.Module) -> bool:
    """Whether a hook may change the block's output; those of transformers itself only record it."""
    return any(
        not str(hook.__module__).startswith("transformers.")
        for hook in block._forward_hooks.values()
    )


def load_clip_tokenizer(source: Source, part: str, words: int) -> CLIPTokenizer:
    """CLIP's tokenizer out of a model's folder or subfolder.

    Args:
        source: the model.
        part: the subfolder; "" for the model's own.
        words: rows of the text encoder's embedding.

    Raises:
        ValueError: files are missing or broken, or it has another number of words.
    """
    tokenizer = load_tokenizer(CLIPTokenizer, source, part, ("vocab.json", "merges.txt"))
    check_words(source, tokenizer, words, len(tokenizer) == words)
    return tokenizer


def load_tokenizer(kind: Any, source: Source, part: str, words: tuple[str, ...]) -> Any:
    """A tokenizer of transformers.

    Args:
        kind: its class.
        source: the model.
        part: the subfolder; "" for the model's own.
        words: the files that can stand for its tokenizer.json.

    Raises:
        ValueError: files are missing or broken.
    """
    prefix = f"{part}/" if part else ""
    names = {name: source.file(prefix + name) for name in (*TOKENIZER_FILES, *words)}
    whole = names["tokenizer.json"] or all(names[name] for name in words)
    config = names["tokenizer_config.json"]
    # transformers makes an empty tokenizer where the words are missing, and takes other special tokens
    # where the config is.
    if not whole or not config:
        raise ValueError(
            f"{source.name} has no whole tokenizer{f' in {part}' if part else ''}: it needs "
            f"tokenizer_config.json, and tokenizer.json or {' with '.join(words)}"
        )
    for name, file in names.items():
        if file is not None and name.endswith(".json"):
            read_object(file)
    with reading(f"the tokenizer of {source.name} ({config.parent.name})"):
        return kind.from_pretrained(str(config.parent))


def check_words(source: Source, tokenizer: Any, words: int, fits: bool) -> None:
    """Raise a ValueError unless the tokenizer's words fit the text encoder's embedding."""
    if not fits:
        raise ValueError(
            f"the tokenizer of {source.name} has {plural(len(tokenizer), 'word')}, its text encoder {words}: "
            "they belong to different models"
        )


def load_text_encoder(
    source: Source,
    settings: LoadSettings,
    *,
    suffix: str = "",
    kind: type[PreTrainedModel] = CLIPTextModel,
    penultimate: bool = False,
    pooled: str | None = None,
) -> TextEncoder:
    """A CLIP text encoder of a pipeline, with its tokenizer.

    Args:
        source: the pipeline.
        settings: how to load it.
        suffix: of its folders' names: ``_2`` of the second encoder.
        kind: the model's class.
        penultimate: whether the denoiser is told the output of the last block but one.
        pooled: see :class:`TextEncoder`.

    Raises:
        ValueError: a part is missing, unreadable, or does not fit the others.
    """
    part = f"text_encoder{suffix}"
    entries = text_config(source, part, "clip_text_model")
    with reading(f"{part}/config.json of {source.name}"):
        config = CLIPTextConfig.from_dict(entries)
    model = load_text_model(source, settings, part, kind, config)
    tokenizer = load_clip_tokenizer(source, f"tokenizer{suffix}", config.vocab_size)
    layer = f"block{config.num_hidden_layers - 2}" if penultimate else None
    return TextEncoder(tokenizer, model, layer=layer, pooled=pooled)


def text_config(source: Source, part: str, model_type: str) -> dict[str, Any]:
    """The config of a text encoder.

    Raises:
        ValueError: it is missing, or of a model of another type.
    """
    path = f"{part}/config.json"
    entries = source.json(path)
    if entries.get("model_type") != model_type:
        found = printable(entries.get("model_type"))
        raise ValueError(f"{path} of {source.name} is of a {found}, not of a {model_type}")
    source.check(path, entries, {})
    return entries


def load_text_model(
    source: Source, settings: LoadSettings, part: str, kind: type[PreTrainedModel], config: Any
) -> PreTrainedModel:
    """The model of a text encoder, frozen.

    Raises:
        ValueError: its weights are missing, unreadable, or not exactly the model's.
    """
    model = transformers_part(
        kind,
        config,
        read_weights(source, part, TRANSFORMERS),
        dtype=settings.number_format,
        attn_implementation=settings.attention,
    )
    return frozen(model, settings.place)


def check_width(source: Source, text: int, denoiser: object) -> None:
    """Raise a ValueError unless the text states are as wide as the denoiser takes them."""
    if text != denoiser:
        raise ValueError(
            f"the text encoder of {source.name} is {text} wide, its denoiser takes {printable(denoiser)}: "
            "they belong to different models"
        )
