"""Hostile and damaged ``.pt`` files: an answer or one line, never more work than the file is long."""

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from copy import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from revelio.unpickle import Inert, Name, read_tensors

ROW = torch.arange(6.0)


def archive(path: Path, program: bytes, storage: bytes = ROW.numpy().tobytes(), **how) -> Path:
    """A ``.pt`` file with this pickle and one storage, ``0``."""
    with zipfile.ZipFile(path, "w", **how) as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/data/0", storage)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


STORAGE = (
    b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + whole(6) + b"tQ"
)


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + size + stride
    return call + b"\x89ccollections\nOrderedDict\n)RtR"


def doubled(seed: bytes, times: int = 200) -> bytes:
    """A tuple of a tuple of ..., each twice: 2^times leaves in some bytes."""
    steps = (b"q\x01h\x01\x86" for _ in range(times))
    return seed + b"".join(steps)


LONG = 1 << 20
BOMBS = {
    "stride 0": tensor(whole(1 << 40) + b"\x85", b"K\x00\x85"),
    "stride 0, smaller": tensor(whole(1 << 20) + b"\x85", b"K\x00\x85"),
    "overflowing sides": tensor((whole(1 << 61) * 3) + b"\x87", b"K\x00K\x00K\x00\x87"),
    "beyond the storage": tensor(b"K\x06\x85", b"K\x01\x85", b"K\x01"),
    "negative stride": tensor(b"K\x02\x85", whole(-1) + b"\x85"),
    "negative offset": tensor(b"K\x02\x85", b"K\x01\x85", whole(-1)),
    "a side that is no number": tensor(text("6") + b"\x85", b"K\x01\x85"),
    "many sides": tensor(b"(" + b"K\x01" * 70 + b"t", b"(" + b"K\x01" * 70 + b"t"),
    "nested path": b"cpathlib\nPosixPath\n" + doubled(text("a")) + b"\x85R",
    "nested device": b"ctorch\ndevice\n" + doubled(text("a")) + b"\x85R",
    "nested key": b"}" + doubled(b")") + b"Ns",
    "nested storage key": b"(" + text("storage") + b"ctorch\nFloatStorage\n"
    + doubled(text("0")) + text("cpu") + b"K\x06tQ",
    "nested reference": b"(" + doubled(text("storage")) + b"NNNNtQ",
    "nested name": doubled(text("os")) + text("system") + b"\x93",
    "nested call": doubled(text("os")) + b")R",
    "nested class": doubled(text("os")) + b")\x81",
    "deep key": b"}" + b")" + b"\x85" * 100_000 + b"Ns",
    "frozen set": b"(" + doubled(b")") + b"\x91",
    "set": b"\x8f(" + doubled(b")") + b"\x90",
    "long path": b"cpathlib\nPosixPath\n(" + text("a" * LONG) + b"q\x01" + b"h\x01" * 10_000 + b"tR",
    "long key": b"}" + text("a" * LONG) + b"Ns",
    "long number": b"\x8b" + struct.pack("<I", LONG) + b"\x7f" * LONG,
    "decimal number": b"I" + b"9" * LONG + b"\n",
    "byte array": b"\x96" + struct.pack("<Q", 1 << 44),
    "bytes that are not there": b"\x8e" + struct.pack("<Q", 1 << 44),
    "text that is not there": b"\x8d" + struct.pack("<Q", 1 << 44),
    "state of a tensor": tensor(b"K\x06\x85", b"K\x01\x85") + b"(NNNNtb",
    "state of a name": b"ccollections\nOrderedDict\n}" + text("a") + b"Nsb",
    "attributes of a list": b"]}" + text("append") + b"Nsb",
    "ordered dict of pairs": b"ccollections\nOrderedDict\n]" + doubled(b")") + b"N\x86a\x85R",
    "another type of storage": b"(" + text("storage") + b"ctorch\nUntypedStorage\n"
    + text("0") + text("cpu") + b"K\x18tQ",
    "storage of another length": STORAGE.replace(whole(6), whole(7)),
    "storage outside": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("../../0")
    + text("cpu") + b"K\x06tQ",
    "persistent text": b"Pstorage\n",
    "extension": b"\x82\x01",
    "duplicate": b"N" + b"2" * 100,
    "instance": b"(ios\nsystem\n",
    "object": b"(cos\nsystem\n" + text("true") + b"o",
    "call": b"cos\nsystem\n" + text("true") + b"\x85R",
    "constructor": b"crevelio.sae.model\nKSparseAutoencoder\n" + b"K\x04K\x04\x86\x81",
    "a marked stack": b"(((ttt1",
    "nothing on the stack": b"a",
    "nothing in the memo": b"h\x07",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("after", [b".", b"0.", b""])
def test_a_hostile_pickle_is_refused_in_one_line(tmp_path, name, after):
    path = archive(tmp_path / "x.pt", b"\x80\x02" + BOMBS[name] + after)
    with pytest.raises(ValueError, match=r"x\.pt (cannot be read safely|is damaged)") as found:
        read_tensors(path)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500 + len(str(path))


def test_members_that_inflate_or_overlap_are_refused(tmp_path):
    path = archive(tmp_path / "x.pt", b"N.", bytes(1 << 22), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 14
    with pytest.raises(ValueError, match="compressed or overlap"):
        read_tensors(path)
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as file:
        file.writestr("x/data.pkl", b"N.")
        file.writestr("x/data/0", bytes(10_000))
        for index in range(1, 9):
            again = copy(file.getinfo("x/data/0"))
            again.filename = f"x/data/{index}"
            file.filelist.append(again)
    with pytest.raises(ValueError, match="compressed or overlap"):
        read_tensors(tmp_path / "y.pt")
    with pytest.raises(ValueError, match="more than the"):
        read_tensors(archive(tmp_path / "z.pt", b"N" * (9 << 20) + b"."))


def test_many_views_of_a_storage_share_its_memory(tmp_path):
    view = tensor(b"K\x03\x85", b"K\x02\x85")
    found = read_tensors(archive(tmp_path / "x.pt", b"(" + view * 5_000 + b"t."))
    assert len({held.data_ptr() for held in found}) == 1
    assert torch.equal(found[-1], ROW[::2])


def test_deep_and_shared_content_is_read_as_it_is(tmp_path):
    found = read_tensors(archive(tmp_path / "x.pt", doubled(text("a")) + b"."))
    assert found[0] is found[1]
    found = read_tensors(archive(tmp_path / "y.pt", b"]" * 200_000 + b"a" * 199_999 + b"."))
    assert isinstance(found, list)


def test_big_endian_numbers_are_refused(tmp_path):
    path = archive(tmp_path / "x.pt", b"N.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("x/byteorder", b"big")
    with pytest.raises(ValueError, match="big-endian"):
        read_tensors(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_in_every_protocol(tmp_path, protocol):
    content = {
        "model": OrderedDict(a=ROW, b=torch.nn.Parameter(ROW)),
        "module": torch.nn.Linear(2, 3).state_dict(),
        "long": [1 << 40, -(1 << 40), "ä" * 300, 1.5, True],
        "cfg": {"dtype": torch.float32, "path": Path("a/b"), "act": torch.nn.ReLU, 7: None},
        "empty": torch.empty(0),
        "scalar": torch.tensor(3.0),
    }
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    found = read_tensors(tmp_path / "x.pt")
    wanted = torch.load(tmp_path / "x.pt", weights_only=False)
    for part in ("model", "module"):
        assert list(found[part]) == list(wanted[part])
        assert all(torch.equal(held, wanted[part][name]) for name, held in found[part].items())
    assert found["long"] == content["long"]
    assert found["cfg"]["path"] == "a/b"
    assert found["cfg"]["act"] == Name("torch.nn.modules.activation", "ReLU")
    assert found["empty"].shape == (0,)
    assert found["scalar"].shape == () and float(found["scalar"]) == 3


def check_plain(value: object) -> None:
    """Nothing but plain values comes out of a pickle."""
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        kinds = (int, float, str, bytes, list, dict, tuple, Inert, torch.Tensor, type(None))
        assert isinstance(item, kinds)
        if isinstance(item, list | tuple):
            todo.extend(item)
        elif isinstance(item, dict | Inert):
            todo.extend((item if isinstance(item, dict) else item.fields).values())


@settings(deadline=None, max_examples=200)
@given(draw=st.randoms(), changes=st.integers(1, 4), cut=st.booleans())
def test_a_damaged_file_gives_plain_values_or_one_line(tmp_path_factory, draw, changes, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    buffer = io.BytesIO()
    torch.save({"state_dict": {"W": ROW.view(2, 3).T}, "cfg": {"k": 3, "p": Path("a")}}, buffer)
    content = bytearray(buffer.getvalue())
    for _ in range(changes):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content[: draw.randrange(len(content))] if cut else content)
    try:
        check_plain(read_tensors(path))
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
PARTS = [
    text("a"),
    text("storage"),
    STORAGE,
    b"K\x02",
    b"N",
    b")",
    b"(",
    b"}",
    b"]",
    b"q\x01",
    b"h\x01",
]
PARTS += [tensor(b"K\x03\x85", b"K\x02\x85"), b"ctorch\ndevice\n", b"ccollections\nOrderedDict\n"]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(OPCODES + PARTS * 6), min_size=1, max_size=40))
def test_any_program_gives_plain_values_or_one_line(tmp_path_factory, parts):
    path = archive(tmp_path_factory.getbasetemp() / "program.pt", b"".join(parts) + b".")
    try:
        found = read_tensors(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
    else:
        check_plain(found)
