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


def test_pictures_stand_in_the_first_question_only(assistant):
    talk = Dialogue(assistant, [picture(1)], io.StringIO())
    with pytest.raises(ValueError, match="has 2 <image> in its text but 1 picture: give"):
        talk.ask("<image> or <image>?", **SETTINGS)
    talk.ask("what is it?\n<image>", **SETTINGS)
    assert talk.turns[0].text == "<image>\nwhat is it?", "as LLaVA has it"
    with pytest.raises(ValueError, match="first question only: take it out"):
        talk.ask("and <image>?", **SETTINGS)


class Terminal(io.StringIO):
    """Standard input that is typed: an exception in the place of a line is raised."""

    encoding, errors = "utf-8", "strict"

    def isatty(self) -> bool:
        return True


def typed(monkeypatch, lines: list) -> None:
    """Let ``input`` meet these lines and exceptions, then the end."""
    left = iter([*lines, EOFError()])

    def read(prompt: str = "") -> str:
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_in_a_terminal_nothing_loses_the_conversation(saved, assistant, monkeypatch, capsys):
    ask, asked = Dialogue.ask, []

    def interrupted_at_second(self, question, **settings):
        asked.append(question)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(self, question, **settings)

    monkeypatch.setattr(Dialogue, "ask", interrupted_at_second)
    mistake = UnicodeDecodeError("utf-8", b"a \x80", 2, 3, "invalid start byte")
    typed(monkeypatch, ["what is it?", "stopped", KeyboardInterrupt(), mistake, "is it small?"])
    words = ["chat.py", "--model", str(saved / "final"), "--image", str(saved / "cat.png")]
    monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu", "--max-new-tokens=6"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    run_script("chat")
    first = assistant.answer(["what is it?"], [[picture(1)]], max_new_tokens=6)[0]
    turns = [
        Turn("user", "<image>\nwhat is it?"),
        Turn("assistant", first),
        Turn("user", "is it small?"),
    ]
    second = assistant.reply([turns], assistant.see([picture(1)]), **SETTINGS)[0]
    said = capsys.readouterr()
    assert said.out == f"{printable(first)}\n{printable(second)}\n"
    assert "this question is not remembered" in said.err
    assert "no UTF-8 at 'a \\udc80': write it in UTF-8; `new` begins anew" in said.err


def test_ctrl_c_during_a_single_question_is_no_success(saved, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Dialogue, "ask", stopped)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--model", str(saved / "final"), "--question", "what?")
    assert stop.value.code == 130


def test_a_line_of_a_pipe_that_cant_be_answered_ends_it(saved, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--model", str(saved / "final"), lines="a dog\n\na <image>\nnot asked\n")
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out.count("\n") == 1
    assert "chat.py: line 3 of the standard input: the question has <image>, but" in said.err


def test_a_closed_standard_input_asks_nothing(saved, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["chat.py", "--device", "cpu", "--model", f"{saved / 'final'}"]
    )
    monkeypatch.setattr(sys, "stdin", None)
    run_script("chat")
    assert capsys.readouterr().out == ""


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
