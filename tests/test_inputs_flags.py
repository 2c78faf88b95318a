"""Every flag of every command with values that it can't have: one line on stderr, status 2, nothing begun."""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from eval import llava_bench
from llava_ext import cli as llava_cli
from revelio import cli

# What the tests know by themselves of the settings: where 0, a negative number or nothing has a meaning.
ZERO = {
    "timestep_range",
    "timesteps", "timestep", "diffc_timestep", "seed", "order_seed", "random_weights", "workers", "views",
    "warmup_steps", "auxk", "auxk_coefficient", "sparsity", "early_stop", "checkpoint_every", "memory_gib",
    "weight_decay", "decay", "dropout", "validation", "cache_gb", "run", "temperature", "price_in",
    "price_out",
    "index", "draw", "rank", "warmup", "held_out", "loss_images", "planted", "find", "guidance", "port",
    "specificity", "detector_threshold",
}  # fmt: skip
SIGNED = {"weights", "strength", "strength_range"}
NEGATIVE = {"seed", "order_seed", "random_weights", "run", "views"}
AT_MOST_ONE = {
    "learning_rate",
    "projector_rate",
    "early_stop",
    "decay",
    "specificity",
    "fraction",
    "validation",
    "dropout",
    "confidence",
    "held_out",
    "warmup",
    "detector_threshold",
}
EMPTY = {"system", "prompt", "negative_prompt"}
# Folders and files that are read; data.source, backbone.name and the like may also be hub ids.
READ = {
    "store", "top", "embeddings", "stores", "test_store", "images", "bench", "answers", "reference",
    "masks", "train_store", "against_store", "means", "concept", "concepts", "texts_file", "against_file",
    "mask", "deepspeed", "reviews", "compare", "root", "pretrained", "image", "source",
    "names", "locality", "beside", "validation_data", "labels",
}  # fmt: skip
READ_FILES = {
    "answers", "reference", "reviews", "compare", "image", "texts_file", "against_file", "mask", "deepspeed",
    "names", "locality", "validation_data", "labels",
}  # fmt: skip
WRITTEN_FILES = {
    ("purity", "out"),
    ("probe", "out"),
    ("name-latents", "out"),
    ("name-latents", "reply_cache"),
    ("steer-eval", "reply_cache"),
    ("locality", "out"),
    ("score", "out"),
    ("judge", "out"),
    ("judge", "reply_cache"),
    ("answer", "out"),
}
EITHER = {"root", "pretrained", "source"}  # a file or a folder
LLAVA = tuple(llava_cli.COMMANDS)
# A cache may stand for these: only the command sees whether they must be there.
CACHED = {(command, "images") for command in LLAVA}
BENCH = ("answer", "judge", "score")


def flags_of(cls: Any, above: str = "") -> Iterator[tuple[str, str, Any]]:
    """(flag, field name, type without bounds) of a config and those inside it."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from flags_of(kind, f"{above}{field.name}.")
        else:
            flag = f"--{above}{field.name}".replace("_", "-")
            yield flag, field.name, kind


def kinds_in(kind: Any) -> set[Any]:
    inside = [kinds_in(one) for one in get_args(kind)] if get_origin(kind) is not None else []
    return {kind}.union(*inside) if not isinstance(kind, str) else {kind}


def wrong_values(command: str, name: str, kind: Any, folder: Path) -> list[str]:
    found, plain = [], kinds_in(kind)
    if int in plain and not any(isinstance(one, str) for one in plain):
        # What is no whole number at all: one of them for each flag.
        found += [("nan", "1e30", "x", "1.5", "", str(-(10**30)))[len(name) % 6], str(10**30)]
        found += [] if name in ZERO else ["0"]
        found += [] if name in NEGATIVE else ["-1"]
        found += ["-2"] if name == "views" else []
    elif int in plain:  # a word or a number
        found += ["-1", "x", "nan"] if name in ZERO else ["0", "-1", "x", "nan"]
    elif float in plain:
        found += ["nan", "inf", ("-inf", "x", "")[len(name) % 3]]
        found += [] if name in SIGNED else ["-1"]
        found += [] if name in ZERO | SIGNED else ["0"]
        found += ["1e30"] if name in AT_MOST_ONE else []
    elif Path in plain:
        found += [""]
        if name in READ and (command, name) not in CACHED:
            found += [str(folder / "missing")]
            if name not in EITHER:
                found += [str(folder if name in READ_FILES else folder / "file")]
        elif (command, name) == ("convert-ksae", "out"):  # a file or a folder
            found += [str(folder / "file" / "x")]
        elif (command, name) in WRITTEN_FILES:
            found += [str(folder), str(folder / "file" / "x")]
        elif (command, name) not in {(script, "json") for script in LLAVA}:
            found += [str(folder / "file"), str(folder / "file" / "x")]
    elif any(isinstance(one, str) for one in plain):
        found += ["x", ""]
    elif str in plain and name not in EMPTY:
        found += [""]
    return found


def required(cls: Any, folder: Path) -> list[str]:
    """Flags that the config can't do without, with values that it can have."""
    words = []
    for field in fields(cls):
        if field.default is MISSING and field.default_factory is MISSING:
            value = folder / "file" if field.name in READ_FILES else folder
            value = folder / "out" if field.name == "out" else value  # not where the files lie
            flag = [] if field.name == "gallery" else [f"--{field.name.replace('_', '-')}"]
            words += [*flag, str(value)]
    return words


def refuse_to_begin(config: Any) -> None:
    raise AssertionError(f"begun with {config}")


Case = tuple[Any, Callable[[list[str]], None]]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    """Config and entry point of each command, none of which begins its work."""
    found: dict[str, Case] = {}
    for name in cli.COMMANDS:
        module = import_module(f"revelio.cli.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "run", refuse_to_begin)
        found[name] = module.Config, lambda words, name=name: cli.main([name, *words])
    for name in BENCH:
        module = import_module(f"eval.bench.commands.{name}")
        monkeypatch.setattr(module, "run", refuse_to_begin)
        found[name] = module.Config, lambda words, name=name: llava_bench.main([name, *words])
    for name in LLAVA:
        module = llava_cli.find_module(name)
        monkeypatch.setattr(module, "run", refuse_to_begin)
        found[name] = module.Config, lambda words, name=name: cli.main(["llava", name, *words])
    return found


def refusal(call: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert said.count("\n") == 1 and said.isprintable() is False and said[:-1].isprintable(), said
    return said


@pytest.mark.parametrize("command", [*cli.COMMANDS, *BENCH, *LLAVA])
def test_every_flag_refuses_what_it_cannot_be(
    command: str, commands: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    cls, call = commands[command]
    base, tried = required(cls, tmp_path), 0
    for flag, name, kind in flags_of(cls):
        if command in ("models", "backbones", "serve") and name in (
            "action",
            "names",
            "name",
            "gallery",
        ):
            continue  # words without a flag
        if (
            command in cli.COMMANDS
            and command != "extract"
            and flag.startswith(("--data.", "--backbone."))
        ):
            continue  # the same dataclasses in every command
        for value in wrong_values(command, name, kind, tmp_path):
            said = refusal(lambda flag=flag, value=value: call([*base, f"{flag}={value}"]), capsys)
            named = flag.rpartition(".")[2].strip("-")
            assert named in said.replace("_", "-"), (flag, value, said)
            tried += 1
    assert tried >= (0 if command == "models" else 1)


@pytest.mark.parametrize("command", [*cli.COMMANDS, *BENCH, *LLAVA])
def test_wrong_words_are_one_line(
    command: str, commands: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cls, call = commands[command]
    (tmp_path / "file").write_text("x")
    base = required(cls, tmp_path)
    assert "--no-such-flag" in refusal(lambda: call([*base, "--no-such-flag", "3"]), capsys)
    assert "\\x1b" in refusal(lambda: call([*base, "--no-\x1b[31mred=3"]), capsys)
    refusal(lambda: call([*base, "--config"]), capsys)
    if base:
        assert base[0].replace(str(tmp_path), "gallery") in refusal(lambda: call([]), capsys)


def test_good_values_begin(
    commands: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first test takes for a refusal is not the base alone."""
    (tmp_path / "file").write_text("x")
    for cls, call in commands.values():
        with pytest.raises(AssertionError, match="begun"):
            call(required(cls, tmp_path))


DEEP = 20_000
NINE = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")]
BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(NINE),
    "deep flow": "a: " + "[" * DEEP + "]" * DEEP,
    "deep open": "a: " + "{b: " * DEEP,
    "deep blocks": "".join(" " * level + "a:\n" for level in range(900)),
    "itself": "a: &a [*a]",
    "a tag": "a: !!python/object/apply:os.system [true]",
    "a key twice": "seed: 1\nseed: 2",
    "a section that is a number": "data: 0",
    "a section that is false": "data: false",
    "a list": "- 1",
    "a word": "word",
    "escapes": '"\\e[31mred": 1',
    "a NUL": 'out: "a\\0b"',
    "an empty path": "out: ''",
    "a path that is a number": "out: 3",
    "not a number": "draws: .nan",
    "a fraction": "draws: 1.5",
    "infinite": "seed: .inf",
    "an empty name": "backbone: {name: ''}",
    "zero": "batch_size: 0",
    "a list for a word": "store_dtype: [float32]",
    "a mapping for a list": "layers: {a: b}",
    "bytes": "out: !!binary aGVsbG8=",
    "a date": "out: 2020-01-01",
    "text in a list of numbers": "timesteps: [x]",
    "binary": "\udcff\udcfe",
    "control": "out: a\x07b",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_yaml_is_one_line_that_names_it(
    name: str, commands: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(BOMBS[name].encode("utf-8", "surrogateescape"))
    flags = [] if name in ("escapes", "a NUL") or "path" in name else ["--out", str(tmp_path / "o")]
    if BOMBS[name].startswith("out:"):
        flags = []
    _, call = commands["extract"]
    said = refusal(lambda: call([f"--config={path}", *flags]), capsys)
    by_flag = {"zero": "--batch-size", "an empty name": "--backbone.name"}
    assert by_flag.get(name, "hostile.yaml") in said
    assert len(said) < 600


@pytest.mark.parametrize("kind", ["folder", "missing", "pipe", "large"])
def test_a_config_that_is_no_file(
    kind: str, commands: dict[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    path = tmp_path / "c\x1b[31m.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.write_bytes(b"# " * (1 << 20))
    _, call = commands["extract"]
    said = refusal(lambda: call([f"--config={path}", "--out", str(tmp_path / "o")]), capsys)
    assert "c\\x1b[31m.yaml" in said
