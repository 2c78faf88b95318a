"""A command line as a user gives it, and the one line by which it refuses."""

import pytest

from revelio.cli import main


def run(*words: object) -> None:
    """Run a command."""
    main([str(word) for word in words])


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The last line that a command ends with, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("revelio: ")
    return line
