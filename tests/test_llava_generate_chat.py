"""The conversation in the terminal: streaming, memory of turns, one line for a mistake."""

import io
import sys

import pytest
from llava_helpers import model_config, picture, tiny_llama, tower_configs

from llava_ext.chat import Talk
from llava_ext.cli import run_script
from llava_ext.conversation import Turn
from llava_ext.generate import Assistant
from llava_ext.language import build_model
from llava_ext.towers import load_towers

SETTINGS = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    clip = tower_configs(root)["clip"]
    config = model_config(tiny_llama(root / "llama"), clip, template="tokenizer")
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    model.save_pretrained(root / "final", tokenizer)
    picture(1).save(root / "cat.png")
    return root


@pytest.fixture(scope="module")
def assistant(saved):
    return Assistant.load(saved / "final", device="cpu")


def test_a_talk_remembers_its_turns(assistant):
    grids, out = assistant.see([picture(1)]), io.StringIO()
    talk = Talk(assistant, 1, grids, out)
    first = talk.ask("what is it?", **SETTINGS)
    second = talk.ask("is it small?", **SETTINGS)
    turns = [
        Turn("user", "<image>\nwhat is it?"),
        Turn("assistant", first),
        Turn("user", "is it small?"),
    ]
    assert [second] == assistant.reply([turns], grids, **SETTINGS)
    assert out.getvalue() == f"{first}\n{second}\n"
    with pytest.raises(ValueError, match="the language model takes 256"):
        talk.ask("a dog " * 200, **SETTINGS)
    assert len(talk.turns) == 4, "a question that can't be answered is not remembered"


def run(monkeypatch, *words: str, lines: str = "") -> None:
    monkeypatch.setattr(sys, "argv", ["chat.py", "--device", "cpu", "--max-new-tokens=6", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    run_script("chat")


def test_one_question_and_a_conversation(saved, assistant, monkeypatch, capsys):
    files = ["--model", str(saved / "final"), "--image", str(saved / "cat.png")]
    run(monkeypatch, *files, "--question", "what is it?")
    (wanted,) = assistant.answer(["what is it?"], [[picture(1)]], max_new_tokens=6)
    assert capsys.readouterr().out == f"{wanted}\n"
    run(monkeypatch, *files, lines="what is it?\nnew\n\nwhat is it?\nexit\nnot asked\n")
    assert capsys.readouterr().out == f"{wanted}\n" * 2


def test_a_mistake_is_one_line_and_status_two(saved, monkeypatch, capsys):
    for words, message in [
        (
            ["--model", str(saved / "final"), "--image", "none.png"],
            "--image is none.png: there is no such file",
        ),
        (["--model", str(saved / "nowhere")], "no model at"),
    ]:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *words)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and message in error and "\n" not in error
