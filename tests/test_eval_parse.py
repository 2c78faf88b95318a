"""The judge's first line -> two scores, or a failure; never a guess."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.bench.mmvp import read_verdict
from eval.bench.parse import parse_scores
from revelio.endpoint import base_address
from revelio.thinking import ends_within_thinking, without_thinking

SCORES = st.one_of(
    st.integers(0, 10).map(float), st.integers(0, 100).map(lambda tenths: tenths / 10)
)
FORMS = st.sampled_from(
    (
        "{a} {b}",
        "{a}, {b}",
        "{a},{b}",
        "({a}, {b})",
        "[{a}; {b}]",
        "**{a} {b}**",
        "`{a} {b}`",
        "{a}/10 {b}/10",
        "{a}/10, {b} / 10",
        "{a} out of 10 and {b} out of 10",
        "Scores: {a} {b}",
        "Scores: {a} and {b}.",
        "The scores are {a}, {b}",
        "  {a}\t{b}  ",
        "Assistant 1: {a}, Assistant 2: {b}",
        "Assistant 1: {a}/10; assistant 2: {b}/10.",
        "**Assistant 1**: {a} **Assistant 2**: {b}",
        "Assistant 2: {b}, Assistant 1: {a}",
        "Assistant 1's score: {a} and Assistant 2's score: {b}",
        "Answer 1 = {a} | Answer 2 = {b}",
        "Assistant 1: {a}\nAssistant 2: {b}",
        "\n\n{a} {b}",
        "{a} - {b}",
    )
)
TAILS = st.sampled_from(
    ("", "\n", "\nBoth saw the 3 dogs.", "\r\nAssistant 1: good", "\n\n5 5\n1 2")
)


HEADS = st.sampled_from(
    (
        "",
        "<think>The first is a 3, the second\n\n1 1\na 4.</think>\n\n",
        "Okay, 5 5?\n</think>",
        "<reasoning>\n2 2\n</reasoning>\n",
        "Here are the scores:\n\n",
        "**My ratings are:**\n",
        "<think>7 7</think>Here are my values:\n",
        "<think>\n\n</think>\n<reason>3 3</reason>\n",
        "[THINK]1 2\n</b> [/THINK]",
        "<thought>5 6</thought>\n",
        "<Thinking>5 6</Thinking>\n",
        "<seed:think>5 6</seed:think>",
        "\u25c1think\u25b75 6\u25c1/think\u25b7",
        "<|begin_of_thought|>\n1 1\n<|end_of_thought|>\n\n<|begin_of_solution|>\n",
        "<|channel|>analysis<|message|>1 1?<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|start|>assistant<|channel|>analysis<|message|>2 2<|end|><|start|>assistant<|channel|>"
        "commentary<|message|>3 3<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>",
        "analysisThe first is an 8.\n5 5assistantfinal",
    )
)


@given(SCORES, SCORES, FORMS, TAILS, HEADS)
def test_every_form_gives_the_scores_that_were_written(
    first: float, second: float, form: str, tail: str, head: str
) -> None:
    text = head + form.format(a=f"{first:g}", b=f"{second:g}") + tail
    assert parse_scores(text) == (first, second)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "  \n ",
        "8",
        "8/10",
        "8.5",
        "8 7 6",
        "8,5 7,5",
        "-1 -1",
        "8 -1",
        "11 5",
        "8 75",
        "1e1 5",
        "nan 5",
        "8/7",
        "I can't judge this.",
        "Both assistants name 2 of 3 dogs.",
        "Assistant 1 found 8 dogs and assistant 2 found 7 cats",
        "Assistant 1: 8, Assistant 1: 7",
        "Assistant 1: 8",
        "Assistant 1: 8\nIt is better than 7.",
        "Assistant 1: 8\nAssistant 2: 7 for its detail",
        "8\n7",
        "Assistant 1: 12, Assistant 2: 7",
        # Patterns that go back and forth would never end.
        "scores" + " " * 100_000 + "x",
        "score " * 50_000,
        "Assistant 1: 8" + "." * 100_000 + "x",
        "8 7" + " " * 100_000 + "6",
    ],
    ids=lambda reply: reply[:40],
)
def test_anything_else_is_a_failure(reply: str) -> None:
    with pytest.raises(ValueError, match=r"no two scores|empty|outside 0 to 10"):
        parse_scores(reply)


@given(st.text(max_size=80))
def test_no_reply_breaks_it_and_every_score_is_in_range(reply: str) -> None:
    try:
        scores = parse_scores(reply)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert len(scores) == 2 and all(0 <= score <= 10 for score in scores)


def test_a_long_line_is_named_short() -> None:
    with pytest.raises(ValueError) as caught:
        parse_scores("word " * 100)
    assert len(str(caught.value)) < 110


@pytest.mark.parametrize(
    "reply",
    [
        "<think>\n8 7 would be",
        "<think>a</think>\n<think>\n8 7",
        "[THINK]8 7",
        " <thought>\n8 7",
        "<reasoning>8 7",
        "<|begin_of_thought|>8 7",
        "<|channel|>analysis<|message|>8 7",
        "<|start|>assistant<|channel|>analysis<|message|>8 7<|end|>",
    ],
)
def test_a_reply_cut_within_its_thinking_says_so(reply: str) -> None:
    with pytest.raises(ValueError, match="raise max_tokens"):
        parse_scores(reply)
    assert read_verdict(reply.replace("8 7", "yes")) is None


@pytest.mark.parametrize(
    "reply",
    ["8 7", "analysis: none", "[1, 2]", "<b>x</b>", "", "I think 8 7", '{"name": "analysis"}'],
)
def test_a_reply_without_thinking_is_left_as_it_is(reply: str) -> None:
    assert without_thinking(reply) == reply and not ends_within_thinking(reply)


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_address_may_be_that_of_the_completions(tail: str) -> None:
    assert base_address("http://h:1/v1" + tail) == "http://h:1/v1"
    assert base_address(None) is None
