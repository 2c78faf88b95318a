"""Samples and batches: ids, labels, lengths after expansion, padding, images in reading order."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_helpers import tiny_language_tokenizer
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import CTRLTokenizer

from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX, ModelConfig, TowerConfig
from llava_ext.conversation import Turn
from llava_ext.dataset import Collator, ConversationDataset, EncodedRecords
from llava_ext.llava_json import Record
from llava_ext.templates import encode, encode_all

TOKENIZER = tiny_language_tokenizer()
CONFIG = ModelConfig(
    "lm", (TowerConfig("clip", "block1"),), template="mpt", system="", max_length=90
)
RECORDS = [
    Record("one", ("a",), (Turn("user", "<image>\nwhat?"), Turn("assistant", "a dog"))),
    Record("text", (), (Turn("user", "hi"), Turn("assistant", "a small dog on grass"))),
    Record("two", ("b", "c"), (Turn("user", "<image> <image>?"), Turn("assistant", "no"))),
]
TOKENS = 7


class Names:
    """Images that show names, so that order can be seen."""

    def get(self, name: str) -> str:
        return name.upper()

    def stack(self, images):
        return {"seen": list(images)}


def dataset(**settings: object) -> ConversationDataset:
    config = replace(CONFIG, **settings.pop("config", {}))  # type: ignore[arg-type]
    return ConversationDataset(RECORDS, TOKENIZER, config, TOKENS, Names(), **settings)  # type: ignore[arg-type]


def test_items_are_the_encoded_records() -> None:
    data = dataset()
    assert len(data) == 3
    for index, record in enumerate(RECORDS):
        sample = encode(TOKENIZER, "mpt", record.turns, "")
        item = data[index]
        assert item["input_ids"].tolist() == sample.input_ids
        assert item["labels"].tolist() == sample.labels
        assert (item["id"], item["images"]) == (record.id, [name.upper() for name in record.images])
        expanded = sum(TOKENS if i == IMAGE_INDEX else 1 for i in sample.input_ids)
        assert data.lengths[index] == expanded


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_pad_and_keep_reading_order(side) -> None:
    data = dataset()
    collator = Collator(TOKENS, 3, Names().stack, side)
    batch = next(iter(DataLoader(data, batch_size=3, collate_fn=collator)))
    lengths = [len(data[n]["input_ids"]) for n in range(3)]
    assert batch["input_ids"].shape == (3, max(lengths))
    assert batch["seen"] == ["A", "B", "C"] and batch["length"] == max(data.lengths)
    for row, length in enumerate(lengths):
        inside = slice(-length, None) if side == "left" else slice(length)
        mask = torch.zeros(max(lengths), dtype=torch.int64)
        mask[inside] = 1
        assert torch.equal(batch["attention_mask"][row], mask)
        assert torch.equal(batch["input_ids"][row][inside], data[row]["input_ids"])
        assert torch.equal(batch["labels"][row][inside], data[row]["labels"])
        assert (batch["input_ids"][row][mask == 0] == 3).all()
        assert (batch["labels"][row][mask == 0] == IGNORE_INDEX).all()


def test_length_is_checked_after_expansion() -> None:
    data = dataset()
    longest = max(data.lengths)
    assert len(dataset(config={"max_length": longest})) == 3
    worst = RECORDS[data.lengths.index(longest)].id
    assert longest > max(len(data[n]["input_ids"]) for n in range(3))
    with pytest.raises(ValueError, match=f"record '{worst}' has {longest} tokens"):
        dataset(config={"max_length": longest - 1})
    dropped = dataset(config={"max_length": longest - 1}, too_long="drop")
    assert dropped.dropped == [worst] and len(dropped) == 2
    assert worst not in [dropped[n]["id"] for n in range(2)]
    with pytest.raises(ValueError, match="every record is longer"):
        dataset(config={"max_length": 3}, too_long="drop")


def test_all_records_that_are_too_long_are_named() -> None:
    lengths = dataset().lengths
    limit = sorted(lengths)[0]
    with pytest.raises(ValueError) as caught:
        dataset(config={"max_length": limit}, source=Path("d.json"))
    said = str(caught.value)
    assert said.startswith("d.json: 2 of 3 records are too long: ") and "\n" not in said
    for record, length in zip(RECORDS, lengths, strict=True):
        assert (f"record {record.id!r} has {length} tokens" in said) == (length > limit)


def bad(name: str) -> Record:
    return Record(name, ("a",), (Turn("user", "<image>"), Turn("assistant", "<|im_end|>")))


def test_a_record_that_cannot_be_masked_is_named() -> None:
    with pytest.raises(ValueError, match=r"^record 'bad': a turn of the assistant"):
        ConversationDataset([*RECORDS, bad("bad")], TOKENIZER, CONFIG, TOKENS, Names())


def test_records_that_cannot_be_masked_are_named_together_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    records = [bad("x"), RECORDS[0], bad("y"), *RECORDS[1:]]
    fine = dataset()
    for _ in range(2):  # encoded, then read again
        with pytest.raises(ValueError) as caught:
            ConversationDataset(records, TOKENIZER, CONFIG, TOKENS, Names(), kept=path)
        said = str(caught.value)
        assert said.startswith("2 of 5 records are wrong: record 'x': a turn of the assistant")
        assert "record 'y'" in said and "`bad_records: skip` leaves them out" in said
        with pytest.warns(UserWarning, match="left out: 2 of 5 records.*'x'.*'y'"):
            found = ConversationDataset(
                records, TOKENIZER, CONFIG, TOKENS, Names(), kept=path, bad="skip"
            )
        assert (len(found), found.lengths, found.records) == (3, fine.lengths, RECORDS)
        for number in range(3):
            assert found[number]["id"] == RECORDS[number].id
            assert torch.equal(found[number]["input_ids"], fine[number]["input_ids"])
            assert torch.equal(found[number]["labels"], fine[number]["labels"])
        found.encoded.save(path)
    with pytest.raises(ValueError, match="2 of 2 records are wrong") as caught:
        ConversationDataset([bad("x"), bad("y")], TOKENIZER, CONFIG, TOKENS, Names(), bad="skip")
    assert "leaves them out" not in str(caught.value)


def test_kept_tokens_are_read_where_they_are_the_same(tmp_path, monkeypatch) -> None:
    from llava_ext import dataset as module

    records = [
        Record(str(n), ("a",), (Turn("user", f"<image> {n}?"), Turn("assistant", f"yes {n}")))
        for n in range(5)
    ]
    config = ModelConfig("x", (TowerConfig("c", "l"),), template="mpt", max_length=200)
    tokenizer, path = tiny_language_tokenizer(), tmp_path / "tokens.safetensors"
    fresh = EncodedRecords.read_or_make(path, records, tokenizer, config)
    for number, sample in enumerate(encode_all(tokenizer, "mpt", [("", r.turns) for r in records])):
        ids, learned = fresh.sample(number)
        assert ids.tolist() == sample.input_ids
        assert learned.tolist() == [label != -100 for label in sample.labels]
    assert fresh.lengths(7) == [len(fresh.sample(n)[0]) + 6 for n in range(5)]
    fresh.save(path)
    made = []
    monkeypatch.setattr(module, "encode_all", lambda *a: made.append(1) or encode_all(*a))
    again = EncodedRecords.read_or_make(path, records, tokenizer, config)
    assert not made and torch.equal(again.ids, fresh.ids)
    for changed, other in ((records[:4], config), (records, replace(config, system="S"))):
        made.clear()
        EncodedRecords.read_or_make(path, changed, tokenizer, other)
        assert made
    made.clear()
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    EncodedRecords.read_or_make(path, records, tokenizer, config)
    assert not made


@pytest.mark.parametrize("part", ["merges", "normalizer"])
def test_kept_tokens_of_a_tokenizer_of_the_same_words_are_not_read(part: str, tmp_path) -> None:
    records = [
        Record("0", ("a",), (Turn("user", "<image> a dog?"), Turn("assistant", "A small dog")))
    ]
    config = ModelConfig("x", (TowerConfig("c", "l"),), template="mpt", max_length=200)
    tokenizer, other = tiny_language_tokenizer(), tiny_language_tokenizer()
    parts = json.loads(other.backend_tokenizer.to_str())
    if part == "merges":
        parts["model"]["merges"] = []
    else:
        parts["normalizer"] = {"type": "Lowercase"}
    other._tokenizer = Tokenizer.from_str(json.dumps(parts))
    assert other.get_vocab() == tokenizer.get_vocab()
    path = tmp_path / "tokens.safetensors"
    kept = EncodedRecords.read_or_make(path, records, tokenizer, config)
    kept.save(path)
    (by_hand,) = encode_all(other, "mpt", [("", records[0].turns)])
    found = EncodedRecords.read_or_make(path, records, other, config)
    assert found.sample(0)[0].tolist() == by_hand.input_ids != kept.sample(0)[0].tolist()


def test_a_slow_tokenizers_rules_are_more_than_its_words(tmp_path) -> None:
    """Of the same words, other merges make other tokens; of the probe they needn't."""
    words = ["<unk>", *(c + end for c in "abcd" for end in ("@@", "")), "ab", "bc", "ab@@", "bc@@"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    config = ModelConfig("lm", (TowerConfig("c", "l"),), template="plain")
    records = [Record("r", (), (Turn("user", "x"), Turn("assistant", "abc ab")))]
    keys, ids = [], []
    for merges in ("a b</w>\nb c</w>", "b c</w>\na b", "a b</w>\nb c</w>"):
        (tmp_path / "merges.txt").write_text(f"#version\n{merges}\n")
        tokenizer: Any = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
        assert getattr(tokenizer, "backend_tokenizer", None) is None
        keys.append(EncodedRecords.read_or_make(None, records, tokenizer, config).key)
        ids.append(tokenizer("abc ab").input_ids)
    assert ids[0] != ids[1] and keys[0] != keys[1] and keys[0] == keys[2]
