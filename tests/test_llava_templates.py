"""Chat templates against brute force: what is learnt, where, and what the ids say."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from backbones_helpers import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_helpers import model_config, tiny_language_tokenizer, tiny_llama
from llava_train_helpers import record, write_data
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from llava_ext import conversation
from llava_ext.bounded import bounded
from llava_ext.config import (
    IGNORE_INDEX,
    IMAGE_INDEX,
    ConversationData,
    ShowConfig,
    TowerConfig,
)
from llava_ext.conversation import Turn, place_images
from llava_ext.llava_json import Record
from llava_ext.show import describe, marked, show
from llava_ext.templates import (
    TEMPLATES,
    Encoded,
    encode,
    encode_all,
    encode_prompt,
    render,
    stop_strings,
)

TOKENIZER = tiny_language_tokenizer()
CHAT = [
    Turn("user", "what is it?\n<image>"),
    Turn("assistant", "a small dog"),
    Turn("user", "is it a cat?"),
    Turn("assistant", "it is"),
]
# Written by hand from SPEC 3.4 and LLaVA's formats; [ ] around what is learnt.
EXPECTED = {
    "mpt": "<|im_start|>system\nS<|im_end|><|im_start|>user\n<image>\nwhat is it?<|im_end|>"
    "<|im_start|>assistant\n[a small dog<|im_end|>]<|im_start|>user\nis it a cat?<|im_end|>"
    "<|im_start|>assistant\n[it is<|im_end|>]",
    "vicuna_v1": "S USER: <image>\nwhat is it? ASSISTANT:[ a small dog</s>]"
    "USER: is it a cat? ASSISTANT:[ it is</s>]",
    "llama_2": "[INST] <<SYS>>\nS\n<</SYS>>\n\n<image>\nwhat is it? [/INST]{ a small dog </s>}"
    "<s>[INST] is it a cat? [/INST]{ it is </s>}",
    "tokenizer": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nwhat is it?<|im_end|>\n"
    "<|im_start|>assistant\n[a small dog<|im_end|>]\n<|im_start|>user\nis it a cat?<|im_end|>\n"
    "<|im_start|>assistant\n[it is<|im_end|>]",
}


def text(ids: list[int]) -> str:
    parts, run = [], []
    for index in [*ids, None]:
        if index is None or index == IMAGE_INDEX:
            parts.append(TOKENIZER.decode(run))
            run = []
            parts.append("<image>" if index is not None else "")
        else:
            run.append(index)
    return "".join(parts)


def learnt_runs(sample: Encoded) -> list[list[int]]:
    """Brute force: the maximal runs of learnt ids."""
    runs: list[list[int]] = []
    before = False
    for label in sample.labels:
        learned = label != IGNORE_INDEX
        if learned and not before:
            runs.append([])
        if learned:
            runs[-1].append(label)
        before = learned
    return runs


@pytest.mark.parametrize("template", EXPECTED)
def test_text_and_mask(template: str) -> None:
    sample = encode(TOKENIZER, template, CHAT, "S")
    marks = "{}" if template == "llama_2" else "[]"
    wanted = EXPECTED[template]
    assert text(sample.input_ids) == wanted.replace(marks[0], "").replace(marks[1], "")
    runs = [piece.partition(marks[1])[0] for piece in wanted.split(marks[0])[1:]]
    assert [TOKENIZER.decode(run) for run in learnt_runs(sample)] == runs
    assert all(a == b for a, b in zip(sample.input_ids, sample.labels, strict=True) if b >= 0)
    assert sample.input_ids.count(IMAGE_INDEX) == 1


def test_plain_learns_the_caption_and_drops_the_request() -> None:
    sample = encode(TOKENIZER, "plain", CHAT[:2])
    caption = TOKENIZER("a small dog\n", add_special_tokens=False).input_ids
    assert sample.input_ids == [IMAGE_INDEX, *caption]
    assert sample.labels == [IGNORE_INDEX, *caption]
    with pytest.raises(ValueError, match="not 4 turns"):
        encode(TOKENIZER, "plain", CHAT)


words = st.lists(
    st.sampled_from(["dog", "a", "cat!", "é", "\n", "🙂", "it's", " ", "1"]), min_size=1
)
texts = words.map(" ".join).map(str.strip).filter(bool)


@given(st.lists(texts, min_size=2, max_size=6), st.sampled_from(TEMPLATES), st.booleans())
@settings(max_examples=150, deadline=None)
def test_masking_is_the_concatenation_of_answers(
    lines: list[str], template: str, image: bool
) -> None:
    if template == "plain":
        lines = lines[:2]
    lines = lines[: len(lines) // 2 * 2]
    turns = [Turn(("user", "assistant")[n % 2], line) for n, line in enumerate(lines)]
    if image:
        turns[0] = Turn("user", f"<image>{turns[0].text}")
    sample = encode(TOKENIZER, template, turns, "")
    stop = stop_strings(template, TOKENIZER)[0]
    lead = " " if template == "vicuna_v1" or template.endswith("llama_2") else ""
    tail = " " if template.endswith("llama_2") else ""
    answers = [f"{lead}{line}{tail}{stop}" for line in lines[1::2]]
    assert [TOKENIZER.decode(run) for run in learnt_runs(sample)] == answers
    whole = "".join(part.text for part in render(template, turns, "", TOKENIZER)).rstrip("\n")
    assert text(sample.input_ids).rstrip("\n") == whole
    # Every answer's prompt at inference is what it was in training.
    for answered in range(1, len(turns), 2):
        prompt = encode_prompt(TOKENIZER, template, turns[:answered], "")
        assert sample.input_ids[: len(prompt)] == prompt
        assert sample.labels[len(prompt)] != IGNORE_INDEX


def test_many_at_once_equal_one_by_one() -> None:
    chats = [CHAT[:2], CHAT, [Turn("user", "hm"), Turn("assistant", "a dog")]] * 300
    together = list(encode_all(TOKENIZER, "mpt", ((str(n), chat) for n, chat in enumerate(chats))))
    assert together[:3] == [encode(TOKENIZER, "mpt", chat) for chat in chats[:3]]
    assert together[3:] == together[:-3]


def straddling() -> PreTrainedTokenizerFast:
    """A tokenizer that joins `:` and what follows: no boundary survives."""
    tokenizer = Tokenizer(BPE(unk_token="?"))
    trainer = BpeTrainer(vocab_size=400, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(["ASSISTANT: a small dog</s>USER:"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def test_a_token_across_the_boundary_is_an_error_with_the_id() -> None:
    bad = straddling()
    with pytest.raises(ValueError, match="can't be masked"):
        encode(bad, "vicuna_v1", CHAT[:2], "")
    chats = [("record 'r7'", CHAT[:2]), ("record 'r8'", CHAT[:2])]
    for (name, _), found in zip(chats, encode_all(bad, "vicuna_v1", chats, ""), strict=True):
        assert isinstance(found, ValueError)
        assert str(found).startswith(f"{name}: template 'vicuna_v1' can't be masked")


@pytest.mark.parametrize("size", [1, 2, 500])
def test_what_cannot_be_masked_is_an_error_in_its_place(size, monkeypatch) -> None:
    monkeypatch.setattr("llava_ext.templates.ENCODE_TOGETHER", size)
    tagged = [Turn("user", "x"), Turn("assistant", "<|im_end|>")]
    chats = [CHAT, tagged, CHAT[:2], tagged, CHAT]
    found = list(encode_all(TOKENIZER, "mpt", ((f"chat {n}", c) for n, c in enumerate(chats))))
    for number, (chat, sample) in enumerate(zip(chats, found, strict=True)):
        if chat is tagged:
            assert isinstance(sample, ValueError)
            assert str(sample).startswith(f"chat {number}: a turn of the assistant holds the templ")
        else:
            assert sample == encode(TOKENIZER, "mpt", chat)


@pytest.mark.parametrize(
    ("turns", "template", "message"),
    [
        (CHAT, "chatml", "choose from plain, mpt, vicuna_v1, llama_2, llava_llama_2, tokenizer"),
        ([], "mpt", "by turns"),
        (CHAT[1:], "mpt", "by turns"),
        ([Turn("user", "a<|im_end|>b"), CHAT[1]], "mpt", "own tag '<|im_end|>'"),
        ([CHAT[0], Turn("assistant", "b</s>")], "vicuna_v1", "turn of the assistant"),
        ([Turn("user", "<|pad|>"), CHAT[1]], "tokenizer", "own tag"),
        (CHAT[:1], "mpt", "assistant has no turn"),
    ],
)
def test_refusals(turns: list[Turn], template: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        encode(TOKENIZER, template, turns)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_tokenizer_without_chat_template() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        encode(tiny_language_tokenizer(pad=False), "tokenizer", CHAT)
    with pytest.raises(ValueError, match="must end with the user's turn"):
        encode_prompt(TOKENIZER, "mpt", CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('\n\x1b') }}",
        "{{ 'a' * 10000000000 }}",
    ],
)
def test_a_chat_template_that_fails_is_one_line(template: str) -> None:
    tokenizer = tiny_language_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="chat template can't be used") as caught:
        encode(tokenizer, "tokenizer", CHAT)
    assert str(caught.value).isprintable()


def test_a_chat_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "bounded", partial(bounded, seconds=0.2))
    tokenizer = tiny_language_tokenizer()
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop
    with pytest.raises(ValueError, match="can't be used \\(it runs too long\\)"):
        encode(tokenizer, "tokenizer", CHAT)
    # Each of many conversations would take as long: the first one ends it.
    with pytest.raises(ValueError, match=r"record 'r0': .*runs too long"):
        list(encode_all(tokenizer, "tokenizer", [("record 'r0'", CHAT)] * 9))


def test_a_chat_template_that_makes_too_much_text_is_refused() -> None:
    tokenizer = tiny_language_tokenizer()
    tokenizer.chat_template = "{{ 'a' * 2000000 }}"
    with pytest.raises(ValueError, match="makes 2,000,000 characters of so short a conversation"):
        encode(tokenizer, "tokenizer", CHAT)


def test_chat_template_that_edits_earlier_turns_is_refused() -> None:
    tokenizer = tiny_language_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="changes earlier turns"):
        encode(tokenizer, "tokenizer", CHAT)


def test_beginning_token_of_the_tokenizer_comes_first_and_is_not_learnt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_language_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    sample = encode(tokenizer, "llama_2", CHAT)
    assert sample.input_ids[0] == bos and sample.labels[0] == IGNORE_INDEX
    assert encode_prompt(tokenizer, "llama_2", CHAT[:1])[0] == bos
    # The chat template writes it itself.
    assert encode(tokenizer, "tokenizer", CHAT).input_ids[:2].count(bos) == 1


def test_images_move_to_the_front() -> None:
    assert place_images("a <image> b") == "<image>\na b"
    assert place_images("what?\n<image>") == "<image>\nwhat?"
    assert place_images("<image> or <image>?") == "<image> or <image>?"
    assert place_images("what?", 2) == "<image>\n<image>\nwhat?"
    assert place_images("what <image>?", 1) == "<image>\nwhat ?"


@pytest.mark.parametrize("template", TEMPLATES)
def test_stop_strings_end_what_is_learnt(template: str) -> None:
    sample = encode(TOKENIZER, template, CHAT[:2], "")
    (stop,) = stop_strings(template, TOKENIZER)
    assert TOKENIZER.decode(learnt_runs(sample)[0]).endswith(stop)


def test_show_marks_what_is_learnt() -> None:
    sample = encode(TOKENIZER, "mpt", CHAT, "")
    shown = marked(sample, TOKENIZER)
    assert shown == "".join(
        f"⟦{part.text}⟧" if part.learned else part.text for part in render("mpt", CHAT, "")
    )
    page = describe(Record("r1", ("a.jpg",), tuple(CHAT)), sample, TOKENIZER)
    rows = page.split("\n\n")[-1].splitlines()
    assert len([row for row in rows if " learnt " in row]) == sum(map(len, learnt_runs(sample)))
    assert any(f"{IMAGE_INDEX}" in row and "<image>" in row for row in rows)
    positions = [int(row.split()[0]) for row in rows if row.strip()[:1].isdigit()]
    assert all(b == a + 1 for a, b in pairwise(positions))


def test_show_takes_the_records_that_training_takes(tmp_path) -> None:
    data = ConversationData(
        write_data(tmp_path / "d.json", [record(0), record(1), record(2), record(3)]), tmp_path
    )
    for number in (0, 2, 3):
        picture(number).save(tmp_path / f"{number}.png")
    model = model_config(tiny_llama(tmp_path / "lm"), TowerConfig("c", "l"), template="mpt")
    config = ShowConfig(data=data, model=model, index=1)
    with pytest.raises(ValueError, match="`bad_records: skip` leaves them out"):
        show(config)
    with pytest.warns(UserWarning, match="left out"):
        assert show(replace(config, bad_records="skip")).startswith("record 'r2', images 2.png")
    assert show(replace(config, limit=1, index=0)).startswith("record 'r0'")
    with pytest.raises(ValueError, match="index is 1: there are records 0 to 0"):
        show(replace(config, limit=1))
    # Of a cache, or where the pictures' folder is gone, the text is the same.
    whole = show(replace(config, index=3, cache=tmp_path / "cache"))
    assert whole.startswith("record 'r3', images 3.png")
    for folder in (None, tmp_path / "gone"):
        elsewhere = ConversationData(data.json, folder)
        assert show(replace(config, data=elsewhere, index=3)) == whole


# From LLaVA's conversation.py, byte for byte: whole prompts with the templates' own system messages.
LLAVA_PROMPTS = {
    "mpt": "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The "
    "assistant gives helpful and honest answers.<|im_end|><|im_start|>user\nhi<|im_end|>"
    "<|im_start|>assistant\nyes<|im_end|><|im_start|>user\nwhy?<|im_end|><|im_start|>assistant\n",
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user's questions. USER: hi ASSISTANT: yes</s>"
    "USER: why? ASSISTANT:",
    "llama_2": "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as "
    "helpfully as possible, while being safe.  Your answers should not include any harmful, unethical, "
    "racist, sexist, toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the answer to a "
    "question, please don't share false information.\n<</SYS>>\n\nhi [/INST] yes </s>"
    "<s>[INST] why? [/INST]",
    "llava_llama_2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.\n<</SYS>>\n\nhi [/INST] yes </s><s>[INST] why? [/INST]",
}


@pytest.mark.parametrize("template", LLAVA_PROMPTS)
def test_whole_prompts_are_llavas(template: str) -> None:
    turns = [Turn("user", "hi"), Turn("assistant", "yes"), Turn("user", "why?")]
    assert "".join(part.text for part in render(template, turns)) == LLAVA_PROMPTS[template]
