"""The structure that CONTRIBUTING.md promises: no circle of imports, also not through lazy ones."""

import ast
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALLED = ("revelio", "llava_ext", "eval")
# transformers wants from_pretrained and save_pretrained on the class that the checkpoint's reader makes.
MEANT = {("llava_ext.model", "llava_ext.checkpoint")}


def modules() -> dict[str, Path]:
    """Every module that is installed, by its dotted name."""
    files = (path for room in INSTALLED for path in sorted((ROOT / room).rglob("*.py")))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file names in any import: at the top, in functions, for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            # A package's own file is meant only where something else than a module is taken from it.
            found |= (below & set(known)) if below <= set(known) else below | {node.module}
    return found & set(known)


def test_no_circle_of_imports_also_not_through_lazy_or_type_only_ones() -> None:
    known = modules()
    graph = {
        name: {one for one in imported(path, known) if one != name and (name, one) not in MEANT}
        for name, path in known.items()
    }
    assert sum(map(len, graph.values())) > 1000  # the walk sees the imports
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_the_contracts_name_every_package() -> None:
    """A new package is told, too, that diffusers and transformers are the backbones' alone."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    named = {one["name"]: one for one in contracts}
    packages = {f"revelio.{path.parent.name}" for path in (ROOT / "revelio").glob("*/__init__.py")}
    only = named["of revelio, only backbones import diffusers and transformers"]
    assert packages - set(only["source_modules"]) == {"revelio.backbones"}
    [ours] = [one for name, one in named.items() if name.startswith("config, seeds and runs")]
    assert packages == set(ours["forbidden_modules"])


# Where the words of a command line are at home, and texts of the library that quote a whole command line.
COMMAND_LAYER = {
    *("revelio/command_line.py", "revelio/help_pages.py", "revelio/completion.py"),
    *("eval/mmvp.py", "eval/lmms.py"),
}
QUOTED = (
    "torchrun --nproc-per-node",
    "pip install --no-deps",
    "# revelio train-diffc --config THIS FILE",  # a config's first line: how it is used
    "revelio llava chat --model FOLDER --image FILE",  # of a model card
    "--config configs/llava/",  # of the paper's items
)


def flags_named(path: Path) -> list[str]:
    """The texts of a file that name a flag, docstrings and help texts of fields aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if id(node) not in documents
    )
    bare = (re.sub("|".join(map(re.escape, QUOTED)), "", " ".join(text.split())) for text in texts)
    return [text for text in bare if re.search(r"(?<![\w-])--[a-z]", text)]


def test_no_text_of_the_library_names_a_flag() -> None:
    found = {
        str(path.relative_to(ROOT)): flags
        for path in modules().values()
        if not {"cli", "commands"} & set(path.parts)
        if path.relative_to(ROOT).as_posix() not in COMMAND_LAYER
        if (flags := flags_named(path))
    }
    assert not found, found
    seen = flags_named(ROOT / "revelio/command_line.py")
    assert "--config" in seen and len(seen) > 5  # the walk sees texts


# Rooms whose files fit in the head, and how long a file and one of `scripts/` may be.
ROOMS, LINES, SCRIPT_LINES = (*INSTALLED, "tools", "benchmarks", "tests"), 400, 60


def test_no_file_is_longer_than_contributing_says() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"{LINES} lines at most" in text and f"scripts under {SCRIPT_LINES}" in text
    allowed = dict.fromkeys(ROOMS, LINES) | {"scripts": SCRIPT_LINES - 1}
    lengths = {
        path.relative_to(ROOT).as_posix(): (
            len(path.read_text(encoding="utf-8").splitlines()),
            most,
        )
        for room, most in allowed.items()
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".js", ".css", ".j2")
    }
    assert len(lengths) > 500  # the walk sees files
    found = {name: lines for name, (lines, most) in lengths.items() if lines > most}
    assert not found, f"split by what each part is for: {found}"
