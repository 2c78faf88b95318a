import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from revelio.cli import COMMANDS, main, run_module
from revelio.door import fail


def revelio(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "revelio.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Config:
    out: Path
    steps: int = 3


def module(run) -> SimpleNamespace:
    return SimpleNamespace(Config=Config, run=run, __doc__="Try.")


def test_usage_lists_every_command() -> None:
    page = revelio("--help")
    assert page.returncode == 0
    for name, summary in COMMANDS.items():
        assert f"  {name} " in page.stdout and summary in page.stdout


def test_import_and_help_pages_need_no_torch() -> None:
    code = (
        "import sys, revelio, importlib\n"
        "from revelio.cli import COMMANDS\n"
        "for name in COMMANDS: importlib.import_module('revelio.commands.' + name.replace('-', '_'))\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'datasets', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    page = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"usage: revelio {name}" in page and "--config FILE" in page


def test_unknown_command_is_one_line() -> None:
    done = revelio("extrct")
    assert done.returncode == 2
    assert done.stderr.startswith("revelio: unknown command 'extrct': choose from backbones")
    assert done.stderr.count("\n") == 1


def test_config_file_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("steps: 7\n")
    seen = []
    arguments = ["--local_rank=0", f"--config={path}", "--out", "x"]
    run_module(module(seen.append), arguments, "try")  # type: ignore[arg-type]
    run_module(module(seen.append), [*arguments, "--steps", "9"], "try")  # type: ignore[arg-type]
    assert seen == [Config(Path("x"), 7), Config(Path("x"), 9)]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("timestep 2000:\n choose 0 to 999"), "timestep 2000: choose 0 to 999"),
        (KeyError("unknown layer 'up'"), "unknown layer 'up'"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_2(error, line, capsys) -> None:
    def fail(_):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_module(module(fail), ["--out", "x"], "try")  # type: ignore[arg-type]
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"revelio: {line}\n"


def test_a_line_is_never_of_a_foreign_values_length(capsys) -> None:
    with pytest.raises(SystemExit):
        fail("revelio", f"x.json has rows {'1' * 10**6}: extract it again")
    line = capsys.readouterr().err
    assert line.startswith("revelio: x.json has rows 1") and line.endswith(": extract it again\n")
    assert line.count("\n") == 1 and len(line) < 2100


def test_ctrl_c_ends_with_130(capsys) -> None:
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_module(module(interrupt), ["--out", "x"], "try")  # type: ignore[arg-type]
    assert stopped.value.code == 130
    assert "--resume continues" in capsys.readouterr().err


def test_a_closed_pipe_is_no_mistake() -> None:
    line = f"{sys.executable} -m revelio.cli extract --help | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: revelio extract") and done.stderr == ""


def test_misspelt_key_in_a_config_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("stps: 7\n")
    with pytest.raises(SystemExit) as stopped:
        run_module(module(print), ["--config", str(path)], "try")  # type: ignore[arg-type]
    assert stopped.value.code == 2
    assert "unknown key `stps`: did you mean `steps`" in capsys.readouterr().err
