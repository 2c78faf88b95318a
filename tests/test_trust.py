import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from revelio import trust


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
        trust.tensor_headers(path)
        return
    try:
        tensors, _ = trust.tensor_headers(path)
    except ValueError as error:
        assert "t.safetensors" in str(error)
    else:  # another shape of the same number of elements is consistent: the reader compares shapes
        assert key == "shape"
        with pytest.raises(ValueError, match="has shape"):
            trust.read_tensors(path, {"a": (3, 4), "b": (5,)})
        assert tensors.keys() == {"a", "b"}


def test_tensors_are_exactly_what_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="lacks c"):
        trust.read_tensors(path, {"a": None, "b": None, "c": None})
    with pytest.raises(ValueError, match="unexpected b"):
        trust.read_tensors(path, {"a": None})
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(4,\)"):
        trust.read_tensors(path, {"a": (4,), "b": None})
    save_file({"a": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(ValueError, match="NaN"):
        trust.read_tensors(path, {"a": None})
    for cut in (0, 5, 8, 40, len(path.read_bytes()) - 1):
        cut_path = tmp_path / "cut.safetensors"
        cut_path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=r"cut\.safetensors"):
            trust.tensor_headers(cut_path)


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
