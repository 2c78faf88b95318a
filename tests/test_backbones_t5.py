"""T5's encoder, and its tokenizer out of sentencepiece's own file, against transformers and sentencepiece."""

import io

import pytest
import sentencepiece
import torch
from backbones_helpers import tiny_t5
from transformers import T5Tokenizer

from revelio.backbones.diffusion.t5 import load_t5, read_sentencepiece
from revelio.backbones.loading import LoadSettings
from revelio.backbones.source import Source

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


@torch.no_grad()
def test_a_folder_with_sentencepieces_file_alone(tmp_path):
    """As most folders on the hub have it: the encoder runs on sentencepiece's own tokens, padded with 0."""
    whole = tiny_t5(words=256)
    whole.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    file = tmp_path / "tokenizer" / "spiece.model"
    file.write_bytes(trained())
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    settings = LoadSettings(device="cpu")
    text = load_t5(Source("m", str(tmp_path)), settings, length=20, masked=True)
    tables, rows = text.tables([TEXTS[1], TEXTS[0]])
    for row, words in zip(rows.tolist(), (TEXTS[1], TEXTS[0]), strict=True):
        ids = [*own.Encode(words), 1]
        padded = torch.tensor([ids + [0] * (20 - len(ids))])
        mask = (torch.arange(20) < len(ids)).long()[None]
        output = whole(padded, attention_mask=mask, output_hidden_states=True)
        torch.testing.assert_close(tables["states"][row : row + 1], output.last_hidden_state)
        assert torch.equal(tables["mask"][row], mask[0])
        found = text.activations([words], ["block0"])["block0"]
        torch.testing.assert_close(found, output.hidden_states[1])
    tiny_t5().save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match="words, its text encoder 40"):
        load_t5(Source("m", str(tmp_path)), settings, length=20)
    file.write_bytes(b"\x0a\xff")
    with pytest.raises(ValueError, match=r"tokenizer/spiece.model of m can't be loaded"):
        load_t5(Source("m", str(tmp_path)), settings, length=20)


@pytest.mark.parametrize(
    "broken", [b"", b"\x0a\xff", b"\x0b\x00", b"\x0a\x02\x15\x00", b"\x0a\x03\x0a\x01a"]
)
def test_a_broken_file_is_an_error(tmp_path, broken):
    (tmp_path / "spiece.model").write_bytes(broken)
    with pytest.raises(ValueError):
        read_sentencepiece(tmp_path / "spiece.model")
