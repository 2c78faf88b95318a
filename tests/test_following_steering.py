"""What `steer` names as the next command, by what its prompts are."""

from pathlib import Path
from typing import Any

import pytest
from test_following import next_words, parse

from revelio.cli import steer


def test_steering_is_measured_on_the_prompts_that_were_drawn_where_they_have_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "my prompts.csv"
    cases: tuple[tuple[str, dict[str, Any], bool], ...] = (
        ("text,class\na cat,cat\na dog,dog\nit barks,dog\n", {"column": "text"}, True),
        ("text,class\na cat,cat\na dog,dog\n", {"column": "text", "limit": 2}, True),
        ("prompt,class\na cat,cat\na dog,dog\n", {"limit": 1}, False),  # of one class
        ("prompt,class\na cat,cat\na dog,\n", {}, False),
        ("prompt,seed\na cat,1\na dog,2\n", {}, False),
    )
    for rows, options, taken in cases:
        table.write_text(rows)
        config = steer.Config(
            concept=(Path("runs/c"),), prompts_file=str(table), out=Path("runs/drawn"), **options
        )
        (words,) = next_words(steer._next(config))
        found = parse(words, monkeypatch)
        assert found.prompts_file == (str(table) if taken else "TABLE")
        assert (found.column, found.limit) == (
            (options["column"], options.get("limit")) if taken else ("prompt", None)
        )
        assert found.target == ("CLASS",)
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat\na dog\n")
    others: list[dict[str, Any]] = [
        {"prompts_file": str(lines)},
        {"prompts_file": "a/b"},
        {"texts": ("a cat",)},
    ]
    for prompts in others:
        config = steer.Config(concept=(Path("runs/c"),), out=Path("runs/drawn"), **prompts)
        assert "--prompts-file TABLE --target CLASS" in steer._next(config)
