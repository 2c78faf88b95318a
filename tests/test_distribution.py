"""Nothing that Revelio says or needs installs another project's package."""

import re
import subprocess
import tomllib
from pathlib import Path

import revelio
from revelio.backbones.packaged import PACKAGED
from revelio.run_dir import versions

ROOT = Path(__file__).parents[1]
NAME = "revelio-diffusion"
# `revelio` on the public index is a package of file-system helpers.
FOREIGN = re.compile(
    r"(?:(?:pip3?|pipx|uv|conda|mamba|poetry)\s+(?:pip\s+)?(?:install|add|run|tool)\b[^\n`]*[\s'\"])"
    r"revelio(?![\w/.-])|\brevelio\[(?=[a-z])"
)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an unpacked archive
        return [path for path in ROOT.rglob("*") if path.is_file() and ".git" not in path.parts]
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_text_installs_a_foreign_package() -> None:
    texts = 0
    for path in tracked():
        if path == Path(__file__) or not path.is_file() or b"\0" in path.read_bytes()[:8192]:
            continue
        texts += 1
        found = FOREIGN.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"
    assert texts > 300


def test_the_pattern_knows_the_ways_to_install() -> None:
    for text in (
        "pip install revelio",
        "pip install -U 'revelio[demo]'",
        "python -m pip install --upgrade revelio && x",
        "uv pip install revelio",
        "uv add revelio",
        "see revelio[llava]",
    ):
        assert FOREIGN.search(text), text
    for text in (
        "pip install .",
        "pip install -e '.[demo]'",
        f"pip install {NAME}",
        "pip install gguf",
    ):
        assert not FOREIGN.search(text), text


def test_names_and_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == NAME and project["dynamic"] == ["version"]
    assert list(project["scripts"]) == ["revelio"]
    assert versions()["revelio"] == revelio.__version__


def test_packaged_models_name_only_their_own_packages_and_the_demo_extra() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for model in PACKAGED.values():
        words = re.findall(r"[\w.-]+(?:[=>]=[\w.]+)", model.install)
        assert words == [*model.needs, f"{model.package}=={model.version}"]
        assert set(model.needs) <= set(extra["demo"])
