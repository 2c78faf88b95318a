"""Tokenizers' own chat templates of the forms that are about, against what transformers renders."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_helpers import CHAT, tiny_language_tokenizer
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from llava_ext.config import IGNORE_INDEX, IMAGE_INDEX
from llava_ext.conversation import Turn
from llava_ext.templates import encode, encode_prompt, render, stop_strings

TAIL = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Qwen3's: what an answer after the last question thinks is shown, be it nothing.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As Qwen3-Thinking's: it can't be told not to think.
ALWAYS_THINKING = THINKING.replace(
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}", "<think>\n"
)
# As Qwen2.5's and SmolLM2's: a system message of its own where there is none.
OWN_SYSTEM = "<|im_start|>system\nyou are a dog<|im_end|>\n"
OWN_SYSTEM = "{% if messages[0]['role'] != 'system' %}" + OWN_SYSTEM + "{% endif %}" + CHAT
# As Gemma's.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
NO_SYSTEM += CHAT
# As Mistral's: the system message moves on to the last question.
MOVING_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + TAIL
)
words = st.lists(st.sampled_from(["dog", "it's", "assistant", "\n", "é", "1"]), min_size=1)
texts = words.map(" ".join).map(str.strip).filter(bool)


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_language_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat(*lines: str) -> list[Turn]:
    return [Turn(("user", "assistant")[n % 2], line) for n, line in enumerate(lines)]


def by_transformers(tokenizer: PreTrainedTokenizerFast, turns: list[Turn], **named: Any) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    found = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **named)
    return str(found)


@given(st.lists(texts, min_size=2, max_size=6), st.sampled_from([THINKING, OWN_SYSTEM, CHAT]))
@settings(max_examples=60, deadline=None)
def test_texts_are_transformers_own_and_answers_alone_are_learnt(
    lines: list[str], template: str
) -> None:
    tokenizer = tokenizer_with(template)
    turns = chat(*lines[: len(lines) // 2 * 2])
    segments = render("tokenizer", turns, None, tokenizer)
    assert "".join(part.text for part in segments) == by_transformers(tokenizer, turns)
    learnt = [part.text for part in segments if part.learned]
    assert learnt == [f"{turn.text}<|im_end|>" for turn in turns[1::2]]
    # At inference the last answer is asked for by the ids that it was trained after.
    sample = encode(tokenizer, "tokenizer", turns)
    prompt = encode_prompt(tokenizer, "tokenizer", turns[:-1])
    assert tokenizer.decode(prompt) == by_transformers(
        tokenizer, turns[:-1], add_generation_prompt=True
    )
    assert sample.input_ids[: len(prompt)] == prompt
    assert all(label != IGNORE_INDEX for label in sample.labels[len(prompt) :])


def test_a_model_that_need_not_think_answers_after_an_empty_thought() -> None:
    tokenizer = tokenizer_with(THINKING)
    segments = render("tokenizer", chat("a", "b", "c", "d"), None, tokenizer)
    assert [part.text for part in segments if not part.learned][:2] == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ]
    assert stop_strings("tokenizer", tokenizer) == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (ALWAYS_THINKING, chat("a", "b")),
        (THINKING, chat("a", "<think>x</think>b")),  # it takes thoughts out
        (CHAT.replace("message['content']", "message['content'] | upper"), chat("a", "b")),
        (CHAT.replace("message['content']", "message['content'] * 2"), chat("a", "b")),
    ],
)
def test_what_cant_be_masked_is_refused(template: str, turns: list[Turn]) -> None:
    with pytest.raises(ValueError, match="changes earlier turns or the answer itself"):
        render("tokenizer", turns, None, tokenizer_with(template))


def test_a_system_message_that_moves_is_refused() -> None:
    tokenizer = tokenizer_with(MOVING_SYSTEM)
    assert render("tokenizer", chat("a", "b", "c", "d"), None, tokenizer)
    with pytest.raises(ValueError, match="changes earlier turns"):
        render("tokenizer", chat("a", "b", "c", "d"), "S", tokenizer)


@pytest.mark.parametrize("template", [CHAT, NO_SYSTEM, OWN_SYSTEM])
def test_an_empty_system_message_is_sent_where_the_template_takes_one(template: str) -> None:
    tokenizer = tokenizer_with(template)
    said = "".join(part.text for part in render("tokenizer", chat("a", "b"), "", tokenizer))
    plain = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    # An empty message is what keeps the template's own away.
    assert said == ("" if template == NO_SYSTEM else "<|im_start|>system\n<|im_end|>\n") + plain
    own = "".join(part.text for part in render("tokenizer", chat("a", "b"), None, tokenizer))
    assert (
        own
        == ("<|im_start|>system\nyou are a dog<|im_end|>\n" if template == OWN_SYSTEM else "")
        + plain
    )


# Of published instruct models (Qwen2.5, SmolLM2, Llama-3), as far as conversations of text go.
OF_CHATML = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + "
    "'<|im_end|>\n' }}{%- else %}{{- '<|im_start|>system\nOWN<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'assistant') %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
OF_LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
HEAD = ["<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"]
PUBLISHED: dict[str, tuple[Callable[..., Any], dict[str, str], str, list[str], list[str]]] = {
    # How it is made, its special tokens, its template, what opens a first and what opens an answer.
    "Qwen2.5": (
        Qwen2Tokenizer,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        OF_CHATML.replace("OWN", QWEN),
        ["<|im_start|>", f"system\n{QWEN}", "<|im_end|>", "\n", "<|im_start|>", "user\n"],
        ["<|im_end|>", "\n", "<|im_start|>", "assistant\n"],
    ),
    "SmolLM2": (
        GPT2Tokenizer,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        OF_CHATML.replace("OWN", SMOLLM),
        ["<|im_start|>", f"system\n{SMOLLM}", "<|im_end|>", "\n", "<|im_start|>", "user\n"],
        ["<|im_end|>", "\n", "<|im_start|>", "assistant\n"],
    ),
    "Llama-3": (
        GPT2Tokenizer,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        OF_LLAMA_3,
        ["<|begin_of_text|>", *HEAD],
        ["<|eot_id|>", HEAD[0], "assistant", *HEAD[2:]],
    ),
}
TAGS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", HEAD[0], HEAD[2],
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_conversations_of_published_templates(name: str) -> None:
    """Ids and labels by a specification written by hand, a list of (text, learnt) pieces."""
    make, special, template, first, opening = PUBLISHED[name]
    words = json.loads(tiny_language_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = {token: number for number, token in enumerate(words["vocab"])}
    merges = [tuple(pair) for pair in words["merges"]]
    tokenizer = make(vocab=vocabulary, merges=merges, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": [*TAGS]})
    tokenizer.chat_template = template

    def ids(*pieces: str) -> list[int]:
        return [
            number
            for piece in pieces
            for number in (
                [tokenizer.convert_tokens_to_ids(piece)]
                if piece in TAGS
                else tokenizer(piece, add_special_tokens=False).input_ids
            )
        ]

    end = opening[0]
    between = ["\n", "<|im_start|>", "user\n"] if end == "<|im_end|>" else HEAD
    # The text after a placeholder is cut there, as it is by an image.
    image = [*ids(*first), IMAGE_INDEX]
    pieces = [
        (image + ids("\nwhat is it?", *opening), False),
        (ids("a Dog's 12 cats", end), True),
        (ids(*between, "why?", *opening), False),
        (ids("it is.", end), True),
    ]
    turns = chat("<image>\nwhat is it?", "a Dog's 12 cats", "why?", "it is.")
    found = encode(tokenizer, "tokenizer", turns)
    assert found.input_ids == [number for some, _ in pieces for number in some]
    assert found.labels == [
        number if learnt else IGNORE_INDEX for some, learnt in pieces for number in some
    ]
    prompt = encode_prompt(tokenizer, "tokenizer", turns[:-1])
    assert prompt == [number for some, _ in pieces[:-1] for number in some]
    assert stop_strings("tokenizer", tokenizer) == [end]
