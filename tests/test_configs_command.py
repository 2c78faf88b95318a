"""`revelio configs` lists and copies; `revelio --print-completion` completes."""

import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from revelio.cli import COMMANDS, GROUPS, main
from revelio.cli.configs import about, shipped_configs
from revelio.config import load_config
from revelio.diffc.config import TrainDiffCConfig
from revelio.sae.config import TrainSAEConfig
from revelio.steering.config import ExtractTextConfig

ROOT = Path(__file__).parents[1] / "configs"
DIFFC = sorted((ROOT / "diffc").glob("*.yaml"))


def test_every_config_is_listed_with_a_line_of_its_own(capsys) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("next: revelio configs copy ")
    lines = lines[:-1]
    listed = {
        line.split()[0]: line.split(maxsplit=1)[1] for line in lines if "/" in line.split("  ")[0]
    }
    files = {str(path.relative_to(ROOT))[: -len(".yaml")]: path for path in ROOT.rglob("*.yaml")}
    assert set(listed) == set(files)
    for name, path in files.items():
        text = path.read_text().split("\n\n")[0].replace("\n# ", " ")
        assert text.startswith("#"), f"{path} begins with no comment"
        assert len(listed[name]) > 10 and f"# {listed[name]}" in text
    assert len(set(listed.values())) == len(listed)


def test_a_line_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("# Sec. 4.2: ten\n# images. And more.\nk: 3\n")
    assert about(path) == "Sec. 4.2: ten images"


@pytest.mark.parametrize("name", [*shipped_configs(), "ksae/quick.yaml"])
def test_a_copy_has_the_same_bytes_and_overwrites_nothing(
    name: str, tmp_path: Path, capsys
) -> None:
    main(["configs", "copy", name, "--out", str(tmp_path / "my")])
    path = ROOT / (name if name.endswith(".yaml") else f"{name}.yaml")
    copied = tmp_path / "my" / path.name
    assert copied.read_bytes() == path.read_bytes()
    assert f"wrote {copied}" in capsys.readouterr().out
    copied.write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main(["configs", "copy", name, "--out", str(tmp_path / "my")])
    assert stopped.value.code == 2 and "is there already" in capsys.readouterr().err
    assert copied.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["copy"], "copy needs a name"),
        (["copy", "ksae/quik"], "did you mean ksae/quick?"),
        (["copy", "../configs/ksae/quick"], "there is no config ../configs/ksae/quick"),
        (["copy", "/etc/passwd"], "there is no config /etc/passwd"),
        (["list", "ksae/quick"], "list takes no name"),
    ],
)
def test_wrong_names_are_one_line(words: list[str], said: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["configs", *words, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_names_every_command(shell: str, capsys) -> None:
    main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert all(name in script for name in [*COMMANDS, *GROUPS, "finetune", "judge"])
    assert all(flag in script for flag in ("--config", "--data.source", "--stage.zero"))


def test_completion_for_no_shell_is_one_line(capsys) -> None:
    for words in (["--print-completion"], ["--print-completion", "fish"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "bash" in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bash") / "completion"
    with path.open("w") as stream, redirect_stdout(stream):
        main(["--print-completion", "bash"])
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["tra"], {"train-ksae", "train-diffc"}),
        (["llava", "f"], {"finetune"}),
        (["llava-bench", "s"], {"score"}),
        (["demo", "--tr"], {"--train-images"}),
        (["train-ksae", "--conf"], {"--config"}),
        (["top-images", "--mode", "as"], {"as_paper", "as_code"}),
    ],
)
def test_bash_completes(typed: list[str], offered: set[str], bash_script: Path) -> None:
    words = " ".join(["revelio", *typed])
    code = (
        f"source {bash_script}\nCOMP_WORDS=({words})\nCOMP_CWORD={len(typed)}\nCOMP_LINE='{words}'\n"
        "COMP_POINT=${#COMP_LINE}\n"
        "f=$(complete -p revelio | grep -o -- '-F [^ ]*' | cut -c4-)\n"
        '$f revelio\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert {word.strip() for word in done.stdout.split()} == offered, done.stderr


@pytest.mark.parametrize("path", DIFFC, ids=lambda path: path.stem)
def test_configs_of_diffc_load(path: Path) -> None:
    config = load_config(TrainDiffCConfig, path)
    assert config.out == Path("runs/diffc") / path.stem
    assert path.read_text().startswith("# ")


def test_there_are_diffc_configs_of_the_papers_runs() -> None:
    assert {"sd15-pets", "sd15-caltech101", "sd15-fgvc", "dit-pets"} <= {p.stem for p in DIFFC}


def test_the_presets_of_steering_are_the_published_settings() -> None:
    settings = {"sd14": (4, 32), "sdxl": (32, 32), "flux": (16, 64)}
    for name, (expansion, k) in settings.items():
        tokens = load_config(ExtractTextConfig, ROOT / "steering" / f"{name}.yaml")
        ksae = load_config(TrainSAEConfig, ROOT / "steering" / f"{name}-ksae.yaml")
        assert (ksae.expansion, ksae.k, ksae.samples) == (expansion, k, 400_000_000)
        assert ksae.store == (tokens.out / tokens.layers[0],)
        assert tokens.padding == "keep"
