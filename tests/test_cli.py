import re
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_type_hints

import pytest
from PIL import Image

from revelio import command_line
from revelio.cli import COMMANDS, GROUPS, SUMMARIES, find_module, main, run_module
from revelio.command_line import one_line_errors
from revelio.help_pages import shown_first

ROOT = Path(__file__).parents[1]
ALL = [("", name) for name in COMMANDS] + [
    (group, name) for group, module in GROUPS.items() for name in import_module(module).COMMANDS
]


def find(group: str, name: str) -> ModuleType:
    """The module of a command, of a group or of none."""
    return import_module(GROUPS[group]).find_module(name) if group else find_module(name)


def revelio(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "revelio", *arguments]
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
    for name, summary in (COMMANDS | SUMMARIES).items():
        assert f"  {name} " in page.stdout and summary in page.stdout


def test_import_and_help_pages_need_no_torch() -> None:
    code = (
        "import sys, revelio, importlib\n"
        "from revelio.cli import COMMANDS, GROUPS, find_module\n"
        "assert not {'llava_ext', 'eval'} & set(sys.modules)\n"
        "for name in COMMANDS: find_module(name)\n"
        "for group in map(importlib.import_module, GROUPS.values()):\n"
        "    for name in group.COMMANDS: group.find_module(name)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'datasets', 'sklearn', 'openai'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("group", "name"), ALL)
def test_every_command_explains_itself(
    group: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([*group.split(), name, "--help-all"])
    page = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"usage: revelio {group} {name}".replace("  ", " ") in page and "--config FILE" in page
    # Flags that are told from unknown ones are those that tyro takes; each tower's have its number.
    shown = {
        one for line in page.splitlines() for one in re.findall(r"--[a-z][\w.-]*", _flags(line))
    }
    shown = {re.sub(r"\.\d+\.", ".0.", one) for one in shown} - {"--help"}
    known = set(command_line.flags_of(find(group, name).Config))
    assert shown == {one for one in known if ".0." not in one or one in shown}


def test_a_short_help_page_has_what_is_set_most_often(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "out layers timesteps train-images resume no-resume"
    flags += " data.source data.split data.root data.label-column data.labels data.limit"
    flags += " backbone.name backbone.image-size backbone.device"
    flags += " sae.k sae.expansion sae.steps sae.learning-rate sae.seed help help-all"
    for word in ("--help", "-h"):
        with pytest.raises(SystemExit):
            main(["demo", word])
        page = capsys.readouterr().out
        assert {f"--{flag}" for flag in flags.split()} == set(
            re.findall(r"--[a-z][a-z.-]*", page)
        ) - {"--config"}
    with pytest.raises(SystemExit):
        main(["plan-ksae", "--help"])
    page = capsys.readouterr().out  # a k-SAE's settings are all there is to it
    assert "--auxk" in page and "--help-all" not in page
    # Pages that are printed leave nothing behind: what they leave out is set as before.
    config = command_line.parse(find("", "demo"), ["--sae.auxk", "3", "--data.max-ratio", "7"], "x")
    assert (config.sae.auxk, config.data.max_ratio) == (3, 7)


def test_settings_that_pages_show_first_are_there() -> None:
    kinds, seen = [find(group, name).Config for group, name in ALL], set()
    while kinds:
        kind = kinds.pop()
        seen.add(kind)
        assert set(shown_first(kind)) <= {field.name for field in fields(kind)}
        hints = [get_type_hints(kind)[field.name] for field in fields(kind)]
        kinds += [hint for hint in hints if is_dataclass(hint) and hint not in seen]
    assert sum(bool(shown_first(kind)) for kind in seen) >= 4


def _flags(line: str) -> str:
    """Of a line of a help page, the flags that it explains."""
    found = re.match(r"(?:[│|] |  )(-.*?)(?:\s\s|[│|]|$)", line)
    return found[1] if found else ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # More is lacking in each of these: what is unknown is told first.
        ("extract --timestep 25", "unknown flag --timestep: did you mean --timesteps?"),
        ("steer --strenght=2", "unknown flag --strenght: did you mean --strength?"),
        ("extract --source x", "unknown flag --source: did you mean --data.source?"),
        ("train-ksae --batch_sise 3", "unknown flag --batch_sise: did you mean --batch-size?"),
        ("llava show --model.towers.1.layr x", "did you mean --model.towers.0.layer?"),
        ("extract --model x", "unknown flag --model: did you mean --backbone.name?"),
        ("pca-maps --dataset=x", "unknown flag --dataset: did you mean --data.source?"),
        ("train-ksae --output x", "unknown flag --output: did you mean --out?"),
        ("purity --model x", "unknown flag --model: "),  # takes none
        ("demo --image x", "unknown flag --image: --help-all lists all"),
        ("purity --images 3", "--images is called --m now"),
        (
            "train-ksae --store x --out y --k 8 16",
            "--k takes one value, and 16 is one more: --grid.k takes",
        ),
        (
            "train-ksae --store x --out y --k=16 16",
            "--k takes one value, and 16 is one more: --grid.k takes",
        ),
        (
            "train-ksae --store x --out y --resume true",
            "--resume takes no value, but is given true",
        ),
        ("extract --layers a --out x y", "--out takes one value, and y is one more: give one"),
        ("backbones a b", "b belongs to no flag: --help lists them"),
        ("llava chatt", "unknown command 'chatt': did you mean chat? choose from cache"),
    ],
)
def test_a_mistyped_word_is_told_what_it_may_have_meant(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1
    assert said in line


def test_unknown_command_is_one_line() -> None:
    done = revelio("extrct")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "revelio: unknown command 'extrct': did you mean extract? choose from backbones"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([group])
    page = capsys.readouterr().out
    for name, summary in import_module(GROUPS[group]).COMMANDS.items():
        assert f"  {name} " in page and summary in page
    with pytest.raises(SystemExit) as stopped:
        main([group, "tain"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    near = "did you mean pretrain? " if group == "llava" else ""
    assert said.startswith(f"revelio {group}: unknown command 'tain': {near}choose from ")


@pytest.mark.parametrize(("package", "extra"), command_line.EXTRAS.items())
def test_a_missing_extra_is_one_line(package: str, extra: str, monkeypatch, capsys) -> None:
    def needs(_: Any) -> None:
        import_module(f"{package}.inner")

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        run_module(module(needs), ["--out", "x"], "try")  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert f"needs {package}, which is not installed" in said and f"`{extra}`" in said
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert any(re.match(r"[\w-]+", one)[0] == package for one in extras[extra])  # type: ignore[index]


def test_another_missing_module_is_no_extra() -> None:
    def needs(_: Any) -> None:
        import_module("no_such_module")

    with pytest.raises(ModuleNotFoundError):
        run_module(module(needs), ["--out", "x"], "try")  # type: ignore[arg-type]


def test_what_needs_a_package_is_refused_before_it_begins() -> None:
    command_line.require("tyro", "parsing")
    with pytest.raises(ValueError, match="ZeRO needs deepspeed, which is not installed"):
        mock = pytest.MonkeyPatch()
        mock.setattr(command_line, "find_spec", lambda _: None)
        try:
            command_line.require("deepspeed", "ZeRO")
        finally:
            mock.undo()


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
        command_line.fail("revelio", f"x.json has rows {'1' * 10**6}: extract it again")
    line = capsys.readouterr().err
    assert line.startswith("revelio: x.json has rows 1") and line.endswith(": extract it again\n")
    assert line.count("\n") == 1 and len(line) < 2100


@pytest.mark.parametrize(("group", "name"), ALL)
def test_ctrl_c_ends_with_130_and_says_how_the_command_goes_on(
    group: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    found = find(group, name)
    monkeypatch.setattr(found, "run", interrupt)
    monkeypatch.setattr("revelio.command_line.parse_flags", lambda *_, **__: None)
    with pytest.raises(SystemExit) as stopped:
        main([*group.split(), name])
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    resumable = "resume" in found.Config.__dataclass_fields__
    assert ("--resume continues" in said) == resumable
    assert ("run the same command again" in said) == (not resumable)


def test_a_closed_pipe_is_no_mistake() -> None:
    line = f"{sys.executable} -m revelio extract --help | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: revelio extract") and done.stderr == ""


def test_misspelt_key_in_a_config_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("stps: 7\n")
    with pytest.raises(SystemExit) as stopped:
        run_module(module(print), ["--config", str(path)], "try")  # type: ignore[arg-type]
    assert stopped.value.code == 2
    assert "unknown key `stps`: did you mean `steps`" in capsys.readouterr().err


def test_a_warning_of_the_library_is_one_line(tmp_path):
    folder = tmp_path / "pets"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / name / "a.png")
    (folder / "cats" / "b.heic").write_bytes(b"not read here")
    program = (
        "from revelio.command_line import one_line_errors\n"
        "from revelio.data.open import open_dataset\n"
        "import sys\n"
        "with one_line_errors('revelio extract'): open_dataset(sys.argv[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    [line] = done.stderr.splitlines()
    assert line.startswith(f"revelio extract: warning: {folder}: 1 file left out")
    assert line.endswith("1 .heic (cats/b.heic: needs the package pillow-heif)")


def test_what_libraries_say_of_coming_versions_is_for_their_authors(monkeypatch):
    theirs = "/usr/lib/python3/site-packages/transformers/modeling_utils.py"
    monkeypatch.delenv("REVELIO_DEBUG", raising=False)
    plain = warnings.formatwarning
    with one_line_errors("revelio"):
        shown = [
            warnings.formatwarning("x", category, file, 3)
            for category in (FutureWarning, DeprecationWarning, RuntimeWarning)
            for file in (theirs, "/home/me/my_models.py")
        ]
        monkeypatch.setenv("REVELIO_DEBUG", "1")
        shown.append(warnings.formatwarning("x", FutureWarning, theirs, 3))
    mine = "/home/me/my_models.py"
    assert shown == [
        "", plain("x", FutureWarning, mine, 3),
        "", plain("x", DeprecationWarning, mine, 3),
        plain("x", RuntimeWarning, theirs, 3), plain("x", RuntimeWarning, mine, 3),
        plain("x", FutureWarning, theirs, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["train", "eval"])
def test_scripts_give_the_commands_help_without_torch(name: str) -> None:
    script = ROOT / "scripts" / f"{name}_diffc.py"
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--local_rank=0', '--help']\n"
        f"try:\n    runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"revelio {name}-diffc" in done.stdout
    assert "--backbone" in done.stdout
