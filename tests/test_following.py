"""Every command ends with the next one, and that one can be run as it stands."""

import ast
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from data_helpers import write_class_folders

from llava_ext import cli as llava_cli
from revelio import cli, command_line
from revelio.analysis.config import FROM_STORE, ServeConfig
from revelio.backbones.config import BackboneConfig
from revelio.cli import train_diffc
from revelio.cli.configs import shipped_configs
from revelio.cli.pictures import model_of, pictures_of_store
from revelio.data.config import DataConfig
from revelio.distributed import is_main
from revelio.following import beside, flags, following
from revelio.pipelines.serve import open_server
from tools.flags_page import all_commands, flags_of

ROOT = Path(__file__).parents[1]
# What makes each step small.
SMALL = {
    "train-ksae": "--steps 3 --expansion 2 --k 2",
    "top-images": "--m 3",
    "purity": "--m 3 --random-sets 100 --permutations 5 --bootstrap 10",
    "gallery": "--latents 4 --map-method pca",
    "train-diffc": "--epochs 1 --width 4 --views 0 --data.per-class 6 --test.limit 20 --workers 0",
    "eval-diffc": "--data.per-class 2 --workers 0",
    "pca-maps": "--data.limit 3",
}


def next_words(text: str) -> list[list[str]]:
    """The commands that an output names, as words."""
    lines = [line for line in text.splitlines() if line.startswith("next: revelio ")]
    return [shlex.split(line.removeprefix("next: revelio ")) for line in lines]


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config that the command would get; what only a user can name need not be there."""
    monkeypatch.setattr("revelio.bounds.check", lambda _: None)
    got: list[Any] = []
    module: Any = None
    if words[0] in cli.GROUPS:
        module, start = import_module(cli.GROUPS[words[0]]).find_module(words[1]), words[2:]
    else:
        module, start = cli.find_module(words[0]), words[1:]
    if hasattr(module, "SECTION"):
        from llava_ext.cli.command import parse as parse_section

        got.append(parse_section(module.Config, start, "", module.SECTION))
    else:
        got.append(command_line.parse(module, start, "x"))
    monkeypatch.undo()
    return got[0]


def test_each_command_leads_to_the_next_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(
        "extract --out 'my runs/a' --data.per-class 3 --layers bottleneck --batch-size 10"
    )
    done = []
    while words[0] not in done:
        done.append(words[0])
        cli.main([*words, *shlex.split(SMALL.get(words[0], ""))])
        found = [one for one in next_words(capsys.readouterr().out) if one[0] != "serve"]
        assert found, f"{done[-1]} names no next command"
        for other in found[:-1]:
            cli.main([*other, *shlex.split(SMALL[other[0]])])
            done.append(other[0])
            assert next_words(capsys.readouterr().out)[0][0] == "gallery"
        words = found[-1]
    wanted = ["extract", "train-ksae", "top-images", "purity", "gallery", "train-diffc"]
    assert done == [*wanted, "eval-diffc", "pca-maps"] and words[0] == "extract"
    assert parse(words, monkeypatch).layers == ("bottleneck",)


@pytest.mark.filterwarnings("ignore:.*labels are read from")
def test_pictures_and_their_table_of_labels_are_passed_on_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_class_folders(Path("all"), {"pictures": 24}, size=32)
    rows = [f"{number}.png,{'ant' if number % 2 else 'bee'}" for number in range(24)]
    Path("labels.csv").write_text("\n".join(["name,kind", *rows]))
    table = ("--data.labels", "labels.csv", "--data.label-column", "kind")
    source = ("--data.source", "all/pictures")
    made = ("--backbone.name", "mini-sd", "--layers", "bottleneck")
    cli.main(["extract", *source, *table, *made, "--out", "runs/a", "--data.limit", "20"])
    store, ksae = "runs/a/bottleneck-t25-empty-d0", "runs/a-ksae"
    (words,) = next_words(capsys.readouterr().out)
    cli.main([*words, *SMALL["train-ksae"].split()])
    (words,) = next_words(capsys.readouterr().out)
    cli.main([*words, "--m", "3"])
    purity, gallery = next_words(capsys.readouterr().out)
    wanted = ["--store", store, "--ksae", ksae, *source]
    assert [word for word in wanted if word not in gallery] == []
    # As it stands: of three images a latent, and where nothing but the top images is given.
    small = ["--random-sets", "100", "--permutations", "5", "--bootstrap", "10"]
    assert set(purity) >= {"--m", "3"}
    cli.main(["purity", "--top", f"{ksae}/top-images", "--m", "3", *small])
    assert next_words(capsys.readouterr().out) == [gallery]
    cli.main([*gallery, *SMALL["gallery"].split(), "--no-beside-controls"])
    served, words = next_words(capsys.readouterr().out)
    assert (served, words[0]) == (["serve", "runs/a-ksae/gallery"], "train-diffc")
    open_server(ServeConfig(gallery=Path(served[1]), port=0)).server_close()
    config = parse(words, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert config.data == DataConfig(
        source="all/pictures", labels=Path("labels.csv"), label_column="kind"
    )
    # Where the place is gone, or a store lies elsewhere, nothing is guessed.
    Path("labels.csv").rename("moved.csv")
    assert pictures_of_store(Path(store), DataConfig(source=FROM_STORE)) == [source[0], "FOLDER"]
    Path(ksae, "top-images").rename("top")
    cli.main(["purity", "--top", "top", "--m", "3", *small])
    (words,) = next_words(capsys.readouterr().out)
    assert words[3:] == ["--store", "STORE", "--ksae", "KSAE", source[0], "FOLDER"]


@pytest.mark.parametrize("labelled", [True, False])
def test_grids_lead_to_a_ksae_of_cells_and_with_labels_to_a_classifier(
    labelled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    write_class_folders(images, {"ant": 2, "bee": 2}, size=32)
    source = images if labelled else images / "ant"
    out = tmp_path / "grids"
    words = ["extract", "--layers", "bottleneck", "--timesteps", "25", "--pool", "none"]
    cli.main([*words, "--data.source", str(source), "--out", str(out)])
    ksae, *others = next_words(capsys.readouterr().out)
    assert [one[0] for one in others] == ["train-diffc"] * labelled
    cli.main([*ksae, *shlex.split(SMALL["train-ksae"])])
    assert "a row is a cell: 4 of each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("backbones", "backbones"),
        ("backbones mini-sd", "extract"),
        ("backbones mini-clip", "extract"),
        ("backbones sd-1.5", "extract"),
        ("configs", "configs"),
        ("plan-ksae --store-rows 100 --d 8 --flops 1e12", "train-ksae"),
    ],
)
def test_lists_and_plans_name_a_command_that_parses(
    words: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(words.split())
    (found,) = next_words(capsys.readouterr().out)
    assert found[0] == command
    parse(found, monkeypatch)


def test_models_lead_to_preparing_or_to_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["models"])
    (found,) = next_words(capsys.readouterr().out)
    assert found in (["demo"], ["models", "prepare", found[-1]])
    parse(found, monkeypatch)


@pytest.mark.parametrize("name", shipped_configs())
def test_a_copied_config_names_the_command_that_reads_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["configs", "copy", name, "--out", str(tmp_path)])
    (found,) = next_words(capsys.readouterr().out)
    lacking = {
        "top-images": "--store S --ksae K",
        "purity": "--top T",
        "gallery": "--store S --ksae K",
    }
    more = lacking.get(found[0], "--out O --store S" if found[0] == "train-ksae" else "").split()
    more = [word for word in more if found[0] != "extract"]
    parse([*found, *more], monkeypatch)


@pytest.mark.parametrize("name", ["cache", "pretrain", "finetune", "show"])
def test_llava_commands_go_on_with_the_same_config(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(shipped_configs()["llava/mini/clip"])
    module = llava_cli.find_module(name)
    monkeypatch.setattr(module, "run", lambda _: None)
    monkeypatch.setattr("revelio.bounds.check", lambda _: None)
    more = ["--cache", "caches/a"] if name == "cache" else []
    cli.main(["llava", name, "--config", path, *more])
    (found,) = next_words(capsys.readouterr().out)
    assert ("--config" in found and path in found) == (name != "finetune")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli.main(["llava", name, "--config", path])
    assert capsys.readouterr().out == "", "one process of several speaks"
    config = parse(found, monkeypatch)
    if name == "cache":
        assert str(config.cache) == "caches/a"


@pytest.mark.parametrize("section", ["pretrain", "finetune"])
@pytest.mark.parametrize("name", ["show", "cache", "cache --plan", "pretrain"])
def test_llava_commands_go_on_with_the_same_records_and_model(
    name: str, section: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *plan = name.split()
    module = llava_cli.find_module(command)
    monkeypatch.setattr(module, "run", lambda _: None)
    monkeypatch.setattr("revelio.bounds.check", lambda _: None)
    model = ["--model.max_length=99", "--model.towers.0.timesteps", "1", "2"]
    records = ["--data.json", "my records.json", "--data.images=pictures", "--limit", "5"]
    own = {"show": ["--index", "3"], "cache": ["--cache", "c", "--keep", "int8", *plan]}
    of = [] if command == "pretrain" else ["--section", section]
    config = ["--config", str(shipped_configs()["llava/mini/clip"])]
    cli.main(["llava", command, *config, *of, *records, *own.get(command, ["--out", "o"]), *model])
    (words,) = next_words(capsys.readouterr().out)
    found = parse(words, monkeypatch)
    assert (found.model.max_length, found.model.towers[0].timesteps) == (99, (1, 2))
    if command != "pretrain":
        assert words[1] == ("cache" if plan else section)
        data = found.data
        assert (data.json, data.images, found.limit) == (
            Path("my records.json"), Path("pictures"), 5,
        )  # fmt: skip
    if plan:
        assert found.keep == "int8" and ("finetune" in words) == (section == "finetune")


def test_words_are_quoted_for_a_shell() -> None:
    for path in ("a b", "it's", "$HOME", "-x", "ä"):
        (words,) = next_words(following("demo", "--data.source", Path(path)))
        assert words == ["demo", "--data.source", path]
    assert following("demo", "a\nb").count("\n") == 0
    assert beside(Path("runs/a"), "ksae") == Path("runs/a-ksae")
    assert beside(Path("."), "ksae") == Path("ksae")


@dataclass(frozen=True)
class Options:
    name: str = "x"
    side_px: int | None = None
    layers: tuple[str, ...] = field(default_factory=lambda: ("a",))


def test_flags_are_those_that_differ() -> None:
    assert list(flags(Options(), "data")) == []
    found = list(flags(Options("y", 3, ("b", "c")), "data"))
    assert found == ["--data.name", "y", "--data.side-px", "3", "--data.layers", "b", "c"]
    assert list(flags(Options("y", 3), "data", "name")) == ["--data.name", "y"]
    assert list(flags(Options("y", 3), "", "name")) == ["--name", "y"]


def test_every_options_field_has_a_default() -> None:
    for name in cli.COMMANDS:
        for one in fields(cli.find_module(name).Config):
            if one.default_factory is not MISSING and is_dataclass(made := one.default_factory()):
                list(flags(made, one.name))


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "3"), ("RANK", "x"), ("WORLD_SIZE", "-1"), ("WORLD_SIZE", "²")]
)
def test_a_launchers_variable_that_was_left_over_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one process of several that are not there, a command would write nothing and say nothing."""
    for one in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is .*unset"):
        is_main()


def test_measures_and_drawings_name_a_command_that_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    from revelio.cli import concept, eval_ksae, probe, steer, zero_shot

    drawn = {"prompts_file": "p.txt", "out": "runs/drawn"}
    latents = {"layer": "up_ft0", "ksae": ("runs/k",), "latent_values": ("13:2.0",)} | drawn
    backbone = BackboneConfig(name="mini-sd-photo")
    lines = {
        "top-images": eval_ksae._next(
            eval_ksae.Config(store="runs/held out", ksae=("runs/k", "l"))
        ),
        "train-ksae": probe._next(
            probe.Config(store=("runs/a", "runs/b"), test_store=("runs/c", "runs/d")),
            [{"store": "a", "value": 0.5}, {"store": "b", "value": 0.75}],
        ),
        "train-diffc": zero_shot._next(
            zero_shot.Config(data=DataConfig(source="my/photos", limit=3))
        ),
        "steer": concept._next(concept.Config(out="runs/c"), "mini-sd-photo"),
        "steer-eval": steer._next(steer.Config(concept=("runs/c",), backbone=backbone, **drawn)),
    }
    found = {name: parse(next_words(line)[0], monkeypatch) for name, line in lines.items()}
    assert {name: next_words(line)[0][0] for name, line in lines.items()} == {n: n for n in lines}
    assert (found["top-images"].store, found["top-images"].ksae) == (
        Path("runs/held out"),
        "runs/k",
    )
    assert found["train-ksae"].store == (Path("runs/b"),)
    assert found["train-diffc"].data == DataConfig(source="my/photos")
    assert found["steer"].prompts_file == "PROMPTS" and found["steer"].backbone == backbone
    assert found["steer-eval"].concept == (Path("runs/c"),)
    assert found["steer-eval"].backbone == backbone
    (words,) = next_words(steer._next(steer.Config(**latents)))
    of_latents = parse(words, monkeypatch)
    assert (of_latents.layer, of_latents.ksae) == ("up_ft0", ("runs/k",))
    assert of_latents.latent_values == ("13:2.0",)


def test_a_model_that_its_own_name_does_not_find_is_given_as_the_extraction_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = tmp_path / "runs/mine/block1", tmp_path / "runs/mine/config.yaml"
    assert model_of(store, "mine") == ["--backbone.name", "mine"]
    store.mkdir(parents=True)
    for text in ("backbone: 3", "backbone: {name: 3}", "layers: []", "backbone: {nam: x}"):
        config.write_text(text)
        assert model_of(store, None) == ["--backbone.name", "BACKBONE"]
    config.write_text("backbone: {name: 'mine:load', image_size: 64, device: cpu}")
    wanted = ["--backbone.name", "mine:load", "--backbone.image-size", "64"]
    assert model_of(store, "mine") == wanted
    for name, named in (("mine:load", "mine:load"), ("/m/sd", "/m/sd"), ("mini-sd", None)):
        made = train_diffc.Config(out=tmp_path, layer="x", backbone=BackboneConfig(name=name))
        (words,) = next_words(train_diffc._next(made))
        assert parse(words, monkeypatch).backbone == named


def named_flags() -> Iterator[tuple[str, str, str]]:
    """Where a next line is made, its command, and a flag that it names, out of the sources."""
    for folder in ("revelio/cli", "llava_ext/cli", "eval/bench/commands"):
        for path in sorted((ROOT / folder).glob("*.py")):
            for made in ast.walk(ast.parse(path.read_text())):
                if isinstance(made, ast.FunctionDef):
                    yield from _named_in(path, made)


def _named_in(path: Path, made: ast.FunctionDef) -> Iterator[tuple[str, str, str]]:
    lists: dict[str, list[str]] = {}
    kinds = (ast.Assign, ast.AugAssign, ast.Call)
    for one in sorted((one for one in ast.walk(made) if isinstance(one, kinds)), key=_line):
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
            lists[one.targets[0].id] = _texts(one.value)
        elif isinstance(one, ast.AugAssign) and isinstance(one.target, ast.Name):
            lists.setdefault(one.target.id, []).extend(_texts(one.value))
        elif isinstance(one, ast.Call) and getattr(one.func, "id", "") == "following":
            words: list[str] = []
            for arg in one.args:
                inside = arg.value if isinstance(arg, ast.Starred) else arg
                known = isinstance(inside, ast.Name) and inside.id in lists
                words += lists[inside.id] if known else _texts(inside)
            commands = [word for word in words if not word.startswith("--")]
            if commands:
                command = " ".join(commands[: 2 if commands[0] in cli.GROUPS else 1])
                where = f"{path.name}:{one.lineno}"
                yield from ((where, command, word) for word in words if word.startswith("--"))


def _line(one: ast.stmt | ast.expr) -> int:
    return one.lineno


def _texts(tree: ast.AST) -> list[str]:
    return [
        one.value
        for one in ast.walk(tree)
        if isinstance(one, ast.Constant) and isinstance(one.value, str)
    ]


def test_every_flag_of_a_next_line_is_one_of_its_commands() -> None:
    known: dict[str, set[str]] = {}
    for command, config in all_commands():
        known.setdefault(command, set()).update(flag.name for flag in flags_of(command, config))
    found = list(named_flags())
    assert len(found) > 40
    anywhere = {"--", "--config"}
    assert not [one for one in found if one[2] not in known[one[1]] | anywhere]


def test_steer_measures_the_very_edit_it_drew(monkeypatch: pytest.MonkeyPatch) -> None:
    from revelio.cli import steer

    alike: dict[str, Any] = {"ksae": ("K",), "operation": "ablate", "weights": (2.0,), "steps": 8}
    given: dict[str, Any] = {"out": Path("runs/d"), "prompts_file": "p", "concept": (Path("c"),)}
    (words,) = next_words(steer._next(steer.Config(**given, **alike)))
    found = parse(words, monkeypatch)
    assert {name: getattr(found, name) for name in alike} == alike
