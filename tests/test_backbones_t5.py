"""T5's tokenizer out of sentencepiece's own file, against sentencepiece."""

import io

import pytest
import sentencepiece
from transformers import T5Tokenizer

from revelio.backbones.diffusion.t5 import read_sentencepiece

TEXTS = ["", "a photo of a cat", "Two  dogs, on grass!", "ﬁne ① naïve ünïcödé", "zebra ☃ 42"]
CORPUS = ["a photo of a cat and two dogs on grass, fine and naive"] * 20 + ["zebra no. 42!"] * 9


def trained() -> bytes:
    """A unigram model with T5's special words and normalizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    return model.getvalue()


def test_words_scores_and_tokens_are_sentencepieces_own(tmp_path):
    file = tmp_path / "spiece.model"
    file.write_bytes(trained())
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    words, table = read_sentencepiece(file)
    expected = [(own.IdToPiece(i), own.GetScore(i)) for i in range(own.GetPieceSize())]
    assert words == expected and table
    tokenizer = T5Tokenizer(vocab=words, _spm_precompiled_charsmap=table)
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*own.Encode(text), 1], text
    plain = T5Tokenizer(vocab=words)
    assert plain(TEXTS[3]).input_ids != [*own.Encode(TEXTS[3]), 1]  # so the table matters


@pytest.mark.parametrize(
    "broken", [b"", b"\x0a\xff", b"\x0b\x00", b"\x0a\x02\x15\x00", b"\x0a\x03\x0a\x01a"]
)
def test_a_broken_file_is_an_error(tmp_path, broken):
    (tmp_path / "spiece.model").write_bytes(broken)
    with pytest.raises(ValueError):
        read_sentencepiece(tmp_path / "spiece.model")
