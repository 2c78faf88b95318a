"""Flags: one meaning and a help text each, old names refused by a line with the new one, one page of all."""

from collections import defaultdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

from revelio.cli import GROUPS, find_module, main
from revelio.config import renamed, structure
from tools.flags_page import IDEAS, all_commands, flags_of, flags_page

FLAGS = [flag for name, cls in all_commands() for flag in flags_of(name, cls)]
OLD = [
    (name, cls, before, now) for name, cls in all_commands() for before, now in renamed(cls).items()
]


def test_the_page_is_what_the_commands_say() -> None:
    page = (Path(__file__).parents[1] / "docs" / "flags.md").read_text(encoding="utf-8")
    assert page == flags_page(), "run: python -m tools.render_docs"


def test_every_flag_has_a_help_text() -> None:
    assert [flag for flag in FLAGS if not flag.help] == []


def test_no_flag_takes_a_number_here_and_a_name_there() -> None:
    kinds: dict[str, set[str]] = defaultdict(set)
    for flag in FLAGS:
        kinds[flag.name].add(flag.kind.replace("path", "text"))
    assert [name for name, found in kinds.items() if len(found) > 1] == []


def test_what_a_flag_is_is_said_once_or_is_one_idea_in_several_places() -> None:
    said: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for flag in FLAGS:
        said[flag.name].add((flag.kind, flag.help))
    several = {name for name, found in said.items() if len(found) > 1}
    assert several - set(IDEAS) == set(), "one meaning a name: rename, or say the idea in IDEAS"
    assert set(IDEAS) - several == set(), "these are said once: leave them out of IDEAS"


@pytest.mark.parametrize(("name", "cls", "before", "now"), OLD)
def test_an_old_name_is_refused_by_a_line_with_the_new_one(
    name: str, cls: type, before: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"--{now}" in {flag.name for flag in FLAGS if flag.command == name}
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), f"--{before}", "3"])
    assert stopped.value.code == 2
    assert f"--{before} is called --{now} now" in capsys.readouterr().err
    key = now.replace("-", "_")
    with pytest.raises(ValueError, match=f"is called `{key}` now"):
        structure(cls, {before.replace("-", "_"): 3})


@pytest.mark.parametrize("name", [name for name, _ in all_commands()])
def test_examples_of_a_help_page_stand_on_lines_of_their_own(name: str) -> None:
    """What isn't indented is joined to paragraphs (Python takes away what all lines but the first have in
    common); a backslash that is not doubled joins lines in Python."""
    group, _, rest = name.partition(" ")
    module = import_module(GROUPS[group]).find_module(rest) if rest else find_module(name)
    lines = (module.__doc__ or "").splitlines()
    assert any(line.lstrip().startswith(("revelio ", "torchrun ")) for line in lines)
    for line in lines:
        assert not line.startswith(("revelio ", "torchrun ", "deepspeed ")), line
        assert "         --" not in line, line


@pytest.mark.parametrize("name", [name for name, _ in all_commands()])
def test_no_line_break_of_a_source_shows_in_a_help_page(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting's text is broken where the next word does not fit, a paragraph of the page likewise."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([*name.split(), "--help-all"])
    # A terminal that is not UTF-8 has boxes of blanks.
    settings = capsys.readouterr().out.partition("from a YAML file first.")[2]
    lines = [line.strip("│|").rstrip() for line in settings.splitlines() if "--- " not in line]
    fit = max(map(len, lines))
    texts = 0
    for line, after in pairwise(lines):
        indent, deeper = (len(one) - len(one.lstrip()) for one in (line, after))
        if line and after and indent == deeper > 2:  # below a flag
            assert len(line) + 1 + len(after.split()[0]) > fit, (line, after)
            texts += 1
    assert texts or len([flag for flag in FLAGS if flag.command == name]) < 16

    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit):
        main([*name.split(), "--help-all"])
    page = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    group, _, rest = name.partition(" ")
    module = import_module(GROUPS[group]).find_module(rest) if rest else find_module(name)
    for paragraph in (module.__doc__ or "").split("\n\n"):
        if not any(line.startswith(" ") for line in paragraph.splitlines()):
            assert any(" ".join(paragraph.split()) in line for line in page), paragraph
