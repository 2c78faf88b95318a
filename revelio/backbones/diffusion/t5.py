"""T5's encoder in front of a denoiser: see :mod:`revelio.backbones.diffusion.text_encoder`."""

from collections.abc import Callable

from transformers import T5Config, T5EncoderModel, T5Tokenizer

from revelio.backbones.diffusion.text_encoder import (
    TextEncoder,
    check_words,
    load_text_model,
    load_tokenizer,
    text_config,
)
from revelio.backbones.loading import LoadSettings, reading
from revelio.backbones.source import Source


def load_t5(
    source: Source,
    settings: LoadSettings,
    *,
    suffix: str = "",
    length: int,
    masked: bool = False,
    prepare: Callable[[str], str] = str,
) -> TextEncoder:
    """A pipeline's T5 encoder, with its tokenizer.

    Args:
        source: the pipeline.
        settings: how to load it.
        suffix: of its folders' names: ``_2`` of the second text encoder.
        length: to which texts are padded and cut, in tokens.
        masked: whether padding is hidden from the encoder; see :class:`TextEncoder`.
        prepare: what is done to a text before it is cut into tokens.

    Raises:
        ValueError: a part is missing, unreadable, or does not fit the other.
    """
    part = f"text_encoder{suffix}"
    entries = text_config(source, part, "t5")
    with reading(f"{part}/config.json of {source.name}"):
        config = T5Config.from_dict(entries)
    model = load_text_model(source, settings, part, T5EncoderModel, config)
    tokenizer = load_tokenizer(T5Tokenizer, source, f"tokenizer{suffix}", ("spiece.model",))
    # The embedding has a few rows more than there are words: 32128 for 32100.
    words: int = config.vocab_size
    check_words(source, tokenizer, words, len(tokenizer) <= words)
    return TextEncoder(tokenizer, model, length=length, masked=masked, prepare=prepare)
