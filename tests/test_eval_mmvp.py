"""MMVP: choices read or judged, credit for pairs only, a run that goes on; a stand-in answers."""

import csv
import json
from pathlib import Path

import pytest
from eval_helpers import Response, judge_server, read_jsonl
from PIL import Image

from eval.bench.mmvp import parse_choice, read_items, read_verdict
from eval.mmvp import main

# Question, right letter, answer; the third pair has one right, the fourth a judge must read.
ROWS = [
    ("Is the door open?", "a", "(a)"), ("Is the door open?", "b", "Closed."),
    ("Is the dog left?", "a", "a) Open"), ("Is the dog left?", "b", "B"),
    ("Is the cat left?", "a", "(a)"), ("Is the cat left?", "b", "open"),
    ("Is it day?", "a", "It is open, I think"), ("Is it day?", "b", "(b)"),
]  # fmt: skip


class StandIn:
    asked = 0

    def answer(self, prompts, images, **_):
        assert all(prompt.endswith("(a) Open (b) Closed") for prompt in prompts)
        StandIn.asked += len(prompts)
        # The picture says which question it is.
        return [ROWS[one[0].width - 20][2] for one in images]


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    folder = tmp_path / "MMVP"
    (folder / "MMVP Images").mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Index", "Question", "Options", "Correct Answer"])
        for number, (question, key, _) in enumerate(ROWS, start=1):
            writer.writerow([number, question, "(a) Open (b) Closed", f"({key})"])
            Image.new("RGB", (19 + number, 24)).save(folder / "MMVP Images" / f"{number}.jpg")
    monkeypatch.setattr("llava_ext.generate.Assistant.load", lambda *_, **__: StandIn())
    return folder


def scores_of(bench: Path, *words: str) -> dict:
    out = bench.parent / "out"
    main(["--bench", str(bench), "--model", "m", "--out", str(out), *words])
    return json.loads((out / "scores.json").read_text())


def test_pairs_count_whose_both_answers_are_right(bench, capsys) -> None:
    found = scores_of(bench, "--batch-size", "3")
    assert found["pairs"]["value"] == 2 / 4 and found["questions"]["value"] == 6 / 8
    assert found["chance"] == 0.25 and found["neither a choice nor judged"] == 1
    assert found["one choice for both pictures"]["value"] == 1 / 4
    assert "pairs                        50.0" in capsys.readouterr().out
    assert len(read_jsonl(bench.parent / "out" / "answers.jsonl")) == 8
    asked = StandIn.asked
    verdicts = iter(["<think>no?</think> Yes.", "No"])
    with judge_server(lambda body, number: Response(next(verdicts))) as server:
        words = ("--judge", "j", "--base-url", server.base_url)
        assert scores_of(bench, *words)["pairs"]["value"] == 3 / 4
        assert scores_of(bench, *words)["judged"] == 1
        (body,) = server.bodies
        assert body["messages"][1]["content"] == (
            "Given the following question Is it day? (a) Open (b) Closed, the correct answer is (a). Does "
            "the following answer correctly answers the question, answer:It is open, I think?"
        )
        assert (
            scores_of(bench, "--judge", "k", "--base-url", server.base_url)["pairs"]["value"] == 0.5
        )
    assert StandIn.asked == asked  # no question was answered twice


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("(a)", "a"), ("A.", "a"), ("b)", "b"), ("**Not there**", "b"), ("(b) not there.", "b"),
     ("there", "a"), ("not", None), ("(a) or (b)", None), ("", None), ("a dog", None)],
)  # fmt: skip
def test_only_a_plain_choice_is_one(answer, letter) -> None:
    assert parse_choice(answer, {"a": "There", "b": "Not there"}) == letter


def test_verdicts() -> None:
    said = {"yes": True, "No, it is": False, "**Yes**": True, "Maybe": None, "Yesterday": None}
    assert {text: read_verdict(text) for text in said} == said


def test_what_is_wrong_is_one_line(bench, capsys) -> None:
    for break_it, message in (
        (lambda t: t.replace("(a) Open (b) Closed", "Open", 1), "they must be as `(a) Open (b) Closed`"),
        (lambda t: t.rstrip().rpartition("\n")[0] + "\n", "holds 7 questions: they must be pairs"),
        (lambda t: t.replace("Options", "Option"), "lacks the column Options"),
        (lambda t: t.replace("\n1,", "\n²,"), "Questions.csv: question ² has the options"),
        (lambda t: t.replace("\n1,", f"\n{'9' * 5000},"), "Questions.csv: question 999"),
        (lambda t: t.replace("(a) Open (b) Closed", f"(a){' ' * 100_000}x", 1), "they must be as"),
    ):  # fmt: skip
        path = bench / "Questions.csv"
        text = path.read_text()
        path.write_text(break_it(text))
        with pytest.raises(ValueError) as error:
            read_items(bench)
        assert message in str(error.value)
        path.write_text(text)
    (bench / "MMVP Images" / "3.jpg").unlink()
    with pytest.raises(SystemExit):
        scores_of(bench)
    assert "3.jpg, which question 3 need" in capsys.readouterr().err
