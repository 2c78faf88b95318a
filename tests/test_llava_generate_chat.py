"""The conversation in the terminal: streaming, memory of turns, one line for a mistake."""

import io
import sys

import pytest
from llava_helpers import model_config, picture, tiny_llama, tower_configs

from llava_ext.chat import Dialogue
from llava_ext.checkpoint import save_model
from llava_ext.cli import run_script
from llava_ext.conversation import Turn
from llava_ext.generate import Assistant
from llava_ext.language import build_model
from llava_ext.towers import load_towers
from revelio.trust import printable

SETTINGS = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    clip = tower_configs(root)["clip"]
    config = model_config(tiny_llama(root / "llama"), clip, template="tokenizer")
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    save_model(model, tokenizer, root / "final")
    picture(1).save(root / "cat.png")
    return root


@pytest.fixture(scope="module")
def assistant(saved):
    return Assistant.load(saved / "final", device="cpu")


def test_a_talk_remembers_its_turns(assistant):
    grids, out = assistant.see([picture(1)]), io.StringIO()
    talk = Dialogue(assistant, [picture(1)], out)
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
    assert capsys.readouterr().out == f"{printable(wanted)}\n"
    run(monkeypatch, *files, lines="what is it?\nnew\n\nwhat is it?\nexit\nnot asked\n")
    assert capsys.readouterr().out == f"{wanted}\n" * 2


def test_pictures_may_be_several(saved, assistant, monkeypatch, capsys):
    picture(2).save(saved / "dog.png")
    files = [f"--image={saved / name}" for name in ("cat.png", "dog.png")]
    run(monkeypatch, "--model", str(saved / "final"), *files, "--question", "what is new?")
    (wanted,) = assistant.answer(["what is new?"], [[picture(1), picture(2)]], max_new_tokens=6)
    assert capsys.readouterr().out == f"{printable(wanted)}\n"


MISTAKES = [
    (["--image", "none.png"], "none.png"),
    (["--model", "nowhere"], "no model at"),
    (["--modell", "x"], "--modell"),
    (["--max-new-tokens", "0"], "max-new-tokens is 0: give 1 or more"),
    (["--max-new-tokens", "many"], "--max-new-tokens is 'many'"),
    (["--temperature", "-1"], "temperature is -1.0: give 0 or more"),
    (["--temperature", "nan"], "temperature is nan"),
    (["--device", "gpu 1"], "give auto, cpu, cuda, cuda:1 or mps"),
    (["--dtype", "int4"], "give float32, bfloat16 or float16"),
    (["--seed", "1.5"], "--seed is '1.5'"),
    (["--question", ""], "question"),
    (["more"], "more"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_one_line_and_status_two(saved, monkeypatch, capsys, words, message):
    given = [] if "--model" in words else ["--model", str(saved / "final")]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *given, *words)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in error and "\n" not in error
    assert error.startswith("chat.py: ")


def test_a_model_must_be_named(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch)
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == "chat.py: needs --model STR"
