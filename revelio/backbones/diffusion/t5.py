"""T5's encoder in front of a denoiser: see :mod:`revelio.backbones.diffusion.text_encoder`.

Many folders on the hub have its tokenizer as ``spiece.model`` alone, a protobuf message of sentencepiece's.
"""

from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]
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
from revelio.trust import regular_file


def lowercased(text: str) -> str:
    """A prompt as the pipelines on T5 put it by default: in lower case, without blanks around it."""
    return text.lower().strip()


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
    tokenizer = _load_tokenizer(source, f"tokenizer{suffix}")
    # The embedding has a few rows more than there are words: 32128 for 32100.
    words: int = config.vocab_size
    check_words(source, tokenizer, words, len(tokenizer) <= words)
    return TextEncoder(tokenizer, model, length=length, masked=masked, prepare=prepare)


def _load_tokenizer(source: Source, part: str) -> T5Tokenizer:
    """The tokenizer out of its tokenizer.json, or out of sentencepiece's file.

    Raises:
        ValueError: files are missing or broken.
    """
    file = source.file(f"{part}/spiece.model")
    if source.file(f"{part}/tokenizer.json") or file is None:
        return load_tokenizer(T5Tokenizer, source, part, ("spiece.model",))
    with reading(f"{part}/spiece.model of {source.name}"):
        words, table = read_sentencepiece(file)
        return T5Tokenizer(vocab=words, _spm_precompiled_charsmap=table)


def read_sentencepiece(file: Path) -> tuple[list[tuple[str, float]], bytes | None]:
    """The words with their scores, and the table of the normalizer, of a sentencepiece model.

    Raises:
        ValueError: the file is broken, or holds no words.
    """
    try:
        model = ModelProto.FromString(regular_file(file).read_bytes())
    except DecodeError as error:
        raise ValueError(str(error)) from error
    for number, word in enumerate(model.pieces):
        if not (word.HasField("piece") and word.HasField("score")):
            raise ValueError(f"word {number} has no text or no score")
    if not model.pieces:
        raise ValueError("it holds no words")
    words = [(word.piece, word.score) for word in model.pieces]
    return words, model.normalizer_spec.precompiled_charsmap or None
