"""The wheel by itself, outside the repository: every command, the configs, the models, the types."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import revelio
from revelio.cli import COMMANDS, GROUPS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as an installer lays them out."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python -m revelio`, with the wheel and the libraries on the path and nothing of the repository."""
    code = (
        "import sys, runpy\n"
        f"sys.path[:] = [p for p in sys.path if {str(ROOT)!r} not in p or 'site-packages' in p]\n"
        f"sys.argv[0] = 'revelio'\nrunpy.run_module('revelio', run_name='__main__')\n"
    )
    paths = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    # -S: no .pth file puts the repository back.
    command = [sys.executable, "-S", "-c", code, *words]
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_has_every_command(installed: Path, tmp_path: Path) -> None:
    for words, said in (
        (["--version"], f"revelio {revelio.__version__}\n"),
        (["demo", "--help"], "usage: revelio demo"),
        (["llava", "pretrain", "--help"], "usage: revelio llava pretrain"),
        (["llava-bench", "score", "--help"], "usage: revelio llava-bench score"),
        (["configs"], "ksae/quick"),
    ):
        done = run(installed, *words, cwd=tmp_path)
        assert done.returncode == 0 and said in done.stdout, (words, done.stderr)
    page = run(installed, cwd=tmp_path).stdout
    assert all(f"  {name} " in page for name in [*COMMANDS, *GROUPS])
    done = run(installed, "configs", "copy", "ksae/quick", "--out", "mine", cwd=tmp_path)
    assert done.stdout.startswith("wrote mine/quick.yaml")
    copied = (tmp_path / "mine" / "quick.yaml").read_bytes()
    assert copied == (ROOT / "configs" / "ksae" / "quick.yaml").read_bytes()


def test_the_wheel_has_models_configs_and_types_and_no_tools(installed: Path) -> None:
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*")}
    for package in ("revelio", "llava_ext", "eval"):
        assert f"{package}/py.typed" in names
        own = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert own <= names
    for kind in ("models", "configs"):
        files = [path for path in (ROOT / kind).rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert f"revelio/shipped_{kind}/{path.relative_to(ROOT / kind).as_posix()}" in names
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"revelio", "llava_ext", "eval"}
