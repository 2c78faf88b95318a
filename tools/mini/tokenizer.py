"""A small byte-level BPE tokenizer of CLIP's kind, trained offline on the captions.

The layout is CLIP's: lower case, `</w>` at the end of a word, `<|startoftext|>` before and
`<|endoftext|>` after, which is also the padding, so that the text encoder's pooled state stands at
the first `<|endoftext|>`.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_bpe(lines: list[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE with CLIP's end-of-word mark.

    Args:
        lines: The captions.
        size: The largest vocabulary; small corpora give less.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
        [pre_tokenizers.Split(" ", "removed"), ByteLevel(add_prefix_space=False)]
    )
    # All 256 bytes, inside a word and at its end: any text can be spelled.
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(alphabet),
        special_tokens=[],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    vocabulary |= {byte + "</w>": len(alphabet) + i for i, byte in enumerate(alphabet)}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    for special in (START, END):
        vocabulary[special] = len(vocabulary)
    return vocabulary, merges


def build_tokenizer(lines: list[str], size: int, max_length: int) -> CLIPTokenizer:
    """A `CLIPTokenizer` trained on the lines."""
    vocabulary, merges = train_bpe(lines, size)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # pyright: ignore
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=max_length,
    )
