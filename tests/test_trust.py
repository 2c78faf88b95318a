"""What is foreign is bounded, typed and confined to its folder before anything is made of it."""

import ast
import json
import os
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_helpers import blank_png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from revelio import tensor_files, trust
from revelio.command_line import run_module
from revelio.pipelines.locality import read_masks
from revelio.pipelines.steer_parts import read_mask
from revelio.steering.prompts import read_prompts
from revelio.trust import read_csv


def test_json_deep_is_one_line(tmp_path: Path) -> None:
    for depth, opened, closed in ((100_000, "[", "]"), (70, '{"a":', "}")):
        path = tmp_path / "deep.json"
        path.write_text(opened * depth + "1" + closed * depth)
        with pytest.raises(ValueError, match=r"deep\.json"):
            trust.read_json(path)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x)))
def test_json_reads_what_json_writes(value: object) -> None:
    assert trust.parse_json(json.dumps(value), "x") == value


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "{", "", "\x00"])
def test_json_refuses(word: str) -> None:
    with pytest.raises(ValueError, match=r"here is not valid JSON"):
        trust.parse_json(word, "here")


def test_yaml_aliases_do_not_explode() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 12):
        text += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
    began = time.monotonic()
    with pytest.raises(ValueError, match="aliases"):
        trust.parse_yaml(text, "bomb.yaml")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: {b: 1, b: 2}",
        "[" * 500,
        "[" * 100 + "]" * 100,
        "a: &x [*x]",
        "a: !!python/object/apply:os.system [ls]",
        "? [a]\n: 1",
        "a: 2020-99-99",
        "a: \x07",
    ],
)
def test_yaml_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"^bad\.yaml"):
        trust.parse_yaml(text, "bad.yaml")


def test_yaml_keeps_honest_anchors() -> None:
    assert trust.parse_yaml("a: &x {k: 1}\nb: *x", "x") == {"a": {"k": 1}, "b": {"k": 1}}
    assert trust.parse_yaml("", "x") is None


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", 3, None, ["x"]]
)
def test_names_stay_inside(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match=r"only a file of this folder"):
        trust.file_in(tmp_path, name)


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "out.txt").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "out.txt")
    (folder / "up").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link"):
        trust.file_in(folder, "link")
    for name in ("link", "up/out.txt", "../out.txt", str(tmp_path / "out.txt")):
        with pytest.raises(ValueError, match="outside"):
            trust.path_in(folder, name)
    (folder / "sub").mkdir()
    assert trust.path_in(folder, "sub/a.jpg") == folder / "sub" / "a.jpg"


def test_pipes_and_folders_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(ValueError, match=r"no file at|not a regular file"):
            trust.read_text(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_any_edit_of_a_header_is_seen(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5)}, path)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    name = data.draw(st.sampled_from(["a", "b"]))
    key = data.draw(st.sampled_from(["shape", "data_offsets", "dtype"]))
    junk = st.one_of(
        st.lists(st.integers(-(2**70), 2**70), max_size=3), st.text(max_size=3), st.none()
    )
    value = data.draw(junk)
    honest = header[name][key]
    header[name][key] = value
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + length :])
    same_count = key == "shape" and value == honest
    if same_count:
        tensor_files.tensor_headers(path)
        return
    try:
        tensors, _ = tensor_files.tensor_headers(path)
    except ValueError as error:
        assert "t.safetensors" in str(error)
    else:  # another shape of the same number of elements is consistent: the reader compares shapes
        assert key == "shape"
        with pytest.raises(ValueError, match="has shape"):
            tensor_files.read_tensors(path, {"a": (3, 4), "b": (5,)})
        assert tensors.keys() == {"a", "b"}


def test_tensors_are_exactly_what_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="lacks c"):
        tensor_files.read_tensors(path, {"a": None, "b": None, "c": None})
    with pytest.raises(ValueError, match="unexpected b"):
        tensor_files.read_tensors(path, {"a": None})
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(4,\)"):
        tensor_files.read_tensors(path, {"a": (4,), "b": None})
    save_file({"a": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(ValueError, match="NaN"):
        tensor_files.read_tensors(path, {"a": None})
    for cut in (0, 5, 8, 40, len(path.read_bytes()) - 1):
        cut_path = tmp_path / "cut.safetensors"
        cut_path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=r"cut\.safetensors"):
            tensor_files.tensor_headers(cut_path)


@pytest.mark.parametrize("dtype", tensor_files._TORCH.values())
def test_rows_are_those_that_safetensors_itself_reads(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "t.safetensors"
    values = (100 * torch.randn(7, 3, 2)).abs().to(getattr(torch, dtype))
    save_file(
        {"a": torch.ones(5, dtype=torch.uint8), "b": values, "c": values[0, 0, 0].clone()}, path
    )
    with safe_open(path, "pt") as file:
        whole = file.get_slice("b")
        for start, stop in [(0, 7), (2, 5), (3, 3), (5, 3), (6, 7), (0, 99)]:
            rows = tensor_files.read_rows(path, "b", start, stop)
            assert rows.dtype == values.dtype and torch.equal(rows, whole[start:stop])
    assert torch.equal(tensor_files.read_rows(path, "c", 0, 1), values[:1, 0, 0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t\.safetensors"):
        tensor_files.read_rows(path, "b", 0, 1)


def test_torn_last_line_is_dropped_only_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for tail in ('{"step": 3', "\0\0\0\0", '{"step": 3\n\0\0'):
        path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
        assert trust.read_json_lines(path, torn=True) == [{"step": 1}, {"step": 2}]
        with pytest.raises(ValueError, match=r"m\.jsonl, line 3"):
            trust.read_json_lines(path)
    path.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        trust.read_json_lines(path, torn=True)


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    assert trust.printable("a\x1b[31m\x07b\n") == "a\\x1b[31m\\x07b\\n"
    assert trust.printable("\udcff.jpg") == "\\udcff.jpg"
    assert trust.printable("naïve 猫.jpg") == "naïve 猫.jpg"


# What parses or opens foreign content, and the modules that may call it: each bounds it first.
ROOMS = {
    "json.loads": {
        "revelio/trust.py",
        "revelio/activations/writer.py",
    },  # the latter of its own text
    "json.load": set(),
    "csv.reader": {"revelio/trust.py"},
    "csv.DictReader": {"revelio/reproduce/items.py"},  # a file of the package
    "yaml.compose": {"revelio/trust.py"},
    "yaml.load": set(),
    "yaml.safe_load": set(),
    "Image.open": {"revelio/data/picture.py"},
    "sqlite3.connect": {"revelio/reply_cache.py"},
    "torch.load": set(),
    "np.load": set(),
    "pickle.load": set(),
    "pickle.loads": set(),
    "zipfile.ZipFile": {"revelio/unpickle.py"},
    "gzip.open": {"revelio/data/sources/idx.py"},
}


def test_foreign_content_is_parsed_in_its_room_only() -> None:
    root = Path(__file__).parents[1]
    for path in (
        one for part in ("revelio", "llava_ext", "eval") for one in (root / part).rglob("*.py")
    ):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if not any(f"{called}(" in text for called in ROOMS):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert name in ROOMS.get(called, {name}), f"{name}:{node.lineno} {called}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no header line"),
        ("a,a\n1,2", "the column 'a' twice"),
        ("a,b\n1", "line 2 has 1 cell"),
        ('a,b\n"1,2', "is not valid CSV"),
        ("a\n" + "x" * 200_000, "is not valid CSV"),
    ],
)
def test_tables_are_whole_or_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_csv(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "value", ["0.5", "1e30", "nan", "9" * 5000, "inf", "x", "--1", str(2**62 + 1), "\u00b2"]
)
def test_seeds_and_guidance_of_prompts_are_numbers_or_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "p.csv").write_text(f"prompt,seed\na dog,7.0\na cat,{value}\n")
    with pytest.raises(ValueError, match="`seed` of row 2 of"):
        read_prompts(str(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_text(
        f"prompt,seed,guidance\na dog,7.0,1.5\na cat,{2**53 + 1},-{value}\n"
    )
    with pytest.raises(ValueError, match="`guidance` of row 2 of"):
        read_prompts(str(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_text(f"prompt,seed\na dog,7.0\na cat,{2**53 + 1}\n")
    assert [one.seed for one in read_prompts(str(tmp_path / "p.csv"))] == [7, 2**53 + 1]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 3\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "kind", ["pipe", "device", "folder", "missing", "empty", "text", "program", "long"]
)
def test_a_mask_is_read_as_any_picture_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "1.png"
    contents = {"empty": b"", "text": b"my thesis", "program": EPS, "long": blank_png(1, 2_000_000)}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind in contents:
        path.write_bytes(contents[kind])
    with pytest.raises(ValueError, match=r"1\.png"):
        read_mask(path)
    with pytest.raises(ValueError, match=r"1\.png"):
        read_masks(tmp_path, ["1"], (2, 2))


def test_nothing_that_a_command_prints_moves_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Config:
        """Nothing."""

    said = "wrote \x1b]0;owned\x07\x1b[2J\udcff\x9b31m\u202e schön 🐈\n\ta table\n"
    module = SimpleNamespace(
        __doc__="x", Config=Config, run=lambda config: (print(said, end=""), sys.stdout.flush())
    )
    run_module(module, [], name="revelio", prog="revelio x")  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert shown == ("wrote \\x1b]0;owned\\x07\\x1b[2J\\udcff\\x9b31m\\u202e schön 🐈\n\ta table\n")
