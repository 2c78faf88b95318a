"""Stores that somebody else wrote: nothing outside is touched, and one line names the file."""

import json
import os
import shutil
import struct
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from activations_helpers import SETTINGS, FakeBackbone, memory_dataset
from files_helpers import contents
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from revelio.activations.extract import extract
from revelio.activations.format import encode_ids
from revelio.activations.store import ActivationStore, write_store
from revelio.activations.writer import StoreWriter
from revelio.analysis.config import FROM_STORE
from revelio.data.config import DataConfig
from revelio.files import partial_path
from revelio.pipelines.inputs import pictures_of

# Every type JSON knows, and what an attacker or an accident would put in its place.
JUNK = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**40, 0.5, -1e300, "", "x",
    "../../precious.txt",
    "/etc/hostname", "shard-00001.safetensors", "shard-00000.safetensors/..", "\u0000", "\u001b[2J", [], [[]],
    [None], ["x"], [-1], [0], [2**62, 2**62], [["a"]], [["a", 1]], [{}], {}, {"file": 3}, {"a": []},
]  # fmt: skip
FIELDS = (
    *("format", "kind", "layer", "dtype", "row_shape", "rows", "labelled", "classes", "skipped", "shards"),
    *("model", "revision", "compute_dtype", "attention", "stride", "timestep", "match_snr", "pool"),
    *("prompt_policy", "seed", "draw", "mode", "image_size", "crop", "dataset", "split", "images"),
    *("dataset_sha256", "contents_sha256", "batch_size", "shard_images", "made_with", "probe"),
)  # fmt: skip
REQUIRED = FIELDS[:10]
# Nothing but what the writer wrote goes with its shards.
ONE_VALUE = ("format", "dtype", "row_shape", "rows", "labelled", "shards")
SHARD_FIELDS = ("file", "rows", "bytes", "sha256")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a store two levels down, and files of the user's beside and above it."""
    root = tmp_path_factory.mktemp("place")
    write_store(
        root / "a" / "s", torch.arange(12.0).view(6, 2), list("abcdef"), [0, 1, 2] * 2, shard_rows=2,
        settings={"layer": "x", "classes": ["p", "q", "r"], "model": "m", "seed": 0},
    )  # fmt: skip
    (root / "precious.txt").write_text("mine")
    (root / "a" / "precious.txt").write_text("mine too")
    return root


def resume(folder: Path) -> None:
    """What an extraction does to a store that is there: check, mend, fill, close."""
    target = StoreWriter(folder, {"layer": "x", "kind": "activations", "model": "m", "seed": 0})
    target.check(resume=True)
    target.begin()
    target.missing(3)
    target.finish(3)


def one_line(call, name: str) -> bool:
    """Whether the call works; where not, it says in one line what is wrong with the file."""
    try:
        call()
    except ValueError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 2000
        assert name in text
        return False
    return True


def open_and_read(folder: Path) -> None:
    store = ActivationStore.open(folder)
    assert len(store.ids) == len(store) == len(store.tensor())
    assert store.labels is None or len(store.labels) == len(store)
    # Whatever opens keeps what it says in bounds.
    assert sum(shard["bytes"] for shard in store.manifest["shards"]) < 10**6


def edited(place: Path, tmp: Path, change) -> bool:
    """Open, read and resume a copy of the store with an edited manifest; see that the rest is whole.

    Returns:
        Whether it opened.
    """
    shutil.rmtree(tmp, ignore_errors=True)
    shutil.copytree(place, tmp)
    folder = tmp / "a" / "s"
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    outside = {name: content for name, content in contents(tmp).items() if "a/s/" not in name}
    shards = {path.name for path in folder.glob("shard-*")}
    opened = one_line(lambda: open_and_read(folder), str(folder))
    one_line(lambda: resume(folder), str(folder))
    assert {n: c for n, c in contents(tmp).items() if "a/s/" not in n} == outside
    assert outside["precious.txt"] == b"mine"
    assert {path.name for path in folder.glob("shard-*")} <= shards
    return opened


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_with_every_kind_of_junk(place, tmp_path, field):
    was = json.loads((place / "a/s/manifest.json").read_text()).get(field)
    for value in JUNK:
        opened = edited(place, tmp_path / "copy", lambda m, value=value: m.update({field: value}))
        if field in ONE_VALUE:
            assert opened == (value == was and type(value) is type(was)), (field, value)
    opened = edited(place, tmp_path / "copy", lambda m: m.pop(field, None))
    assert opened == (field not in REQUIRED)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("field", SHARD_FIELDS)
def test_every_field_of_a_shard_with_every_kind_of_junk(place, tmp_path, field, number):
    was = json.loads((place / "a/s/manifest.json").read_text())["shards"][number]
    for value in JUNK:

        def change(manifest, value=value):
            manifest["shards"][number][field] = value

        same = type(value) is type(was[field]) and value == was[field]
        assert edited(place, tmp_path / "copy", change) == same, (field, value)


@settings(max_examples=120, deadline=None)
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(FIELDS + SHARD_FIELDS),
            st.integers(0, 2),
            st.recursive(
                st.sampled_from(JUNK) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
                lambda inner: st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                max_leaves=6,
            ),
        ),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_any_edit_of_a_manifest_is_one_line(place, tmp_path_factory, edits):
    def change(manifest):
        for field, number, value in edits:
            if field in SHARD_FIELDS:
                if isinstance(manifest.get("shards"), list) and len(manifest["shards"]) > number:
                    shard = manifest["shards"][number]
                    if isinstance(shard, dict):
                        shard[field] = value
            else:
                manifest[field] = value

    edited(place, tmp_path_factory.mktemp("edit") / "copy", change)


def reseal(folder: Path, number: int, content: bytes, **entry: object) -> None:
    """Put a shard's bytes in place and make size and hash in the manifest right."""
    path = folder / f"shard-{number:05d}.safetensors"
    path.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    right = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    manifest["shards"][number].update(right | entry)
    (folder / "manifest.json").write_text(json.dumps(manifest))


NOTES = {"revelio": json.dumps({"format": 1, "skipped": []})}
ROWS, IDS, LABELS = torch.zeros(2, 2), encode_ids(["c", "d"]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("tensors", "notes"),
    [
        ({"activations": ROWS, "ids": IDS, "labels": LABELS[:1]}, NOTES),
        ({"activations": ROWS, "ids": IDS, "labels": torch.tensor([0, 3])}, NOTES),
        ({"activations": ROWS, "ids": IDS, "labels": torch.tensor([-1, 0])}, NOTES),
        ({"activations": ROWS, "ids": IDS, "labels": torch.tensor([0, 2**40])}, NOTES),
        ({"activations": ROWS, "ids": IDS, "labels": torch.tensor([0.0, 1.0])}, NOTES),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS.int()}, NOTES),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS[:, None]}, NOTES),
        ({"activations": ROWS, "ids": IDS}, NOTES),
        ({"activations": ROWS, "ids": encode_ids(["c"]), "labels": LABELS}, NOTES),
        ({"activations": ROWS, "ids": encode_ids(list("cde")), "labels": LABELS}, NOTES),
        ({"activations": ROWS, "ids": torch.zeros(9, dtype=torch.uint8), "labels": LABELS}, NOTES),
        ({"activations": ROWS, "ids": IDS.float(), "labels": LABELS}, NOTES),
        ({"activations": ROWS, "ids": IDS[None], "labels": LABELS}, NOTES),
        ({"activations": ROWS.int(), "ids": IDS, "labels": LABELS}, NOTES),
        ({"activations": ROWS.half(), "ids": IDS, "labels": LABELS}, NOTES),
        ({"activations": torch.tensor(0.0), "ids": IDS, "labels": LABELS}, NOTES),
        ({"activations": torch.zeros(2, 3), "ids": IDS, "labels": LABELS}, NOTES),
        ({"activations": torch.zeros(3, 2), "ids": IDS, "labels": LABELS}, NOTES),
        ({"ids": IDS, "labels": LABELS}, NOTES),
        ({"activations": ROWS, "labels": LABELS}, NOTES),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS}, {}),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS}, {"revelio": "[" * 9999}),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS}, {"revelio": "[]"}),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS}, {"revelio": '{"format": true}'}),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS}, {"revelio": '{"format": 1}'}),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS}, {"revelio": '{"format":1,"skipped":[1]}'}),
        ({"activations": ROWS, "ids": IDS, "labels": LABELS}, {"revelio": '{"format":1,"skipped":[[1,2]]}'}),
    ],
)  # fmt: skip
def test_inconsistent_shards_with_right_hashes_do_not_open(place, tmp_path, tensors, notes):
    folder = tmp_path / "s"
    shutil.copytree(place / "a" / "s", folder)
    reseal(folder, 1, save(tensors, notes))
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors") as caught:
        ActivationStore.open(folder)
    assert str(caught.value).isprintable()
    # The same consistent bytes do open: it was the tensors that were refused.
    reseal(folder, 1, save({"activations": ROWS, "ids": IDS, "labels": LABELS}, NOTES))
    assert ActivationStore.open(folder).ids == list("abcdef")


def test_rows_that_only_add_up_are_refused(place, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(place / "a" / "s", folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for rows in ([-2, 6, 2], [4, 0, 2], [1, 3, 2], [2.0, 2, 2], [2, 2, True]):
        for shard, count in zip(manifest["shards"], rows, strict=True):
            shard["rows"] = count
        path.write_text(json.dumps(manifest | {"rows": 6}))
        with pytest.raises(ValueError, match=r"rows.*shard|shard.*disagrees"):
            ActivationStore.open(folder)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_edit_of_a_shards_header_is_one_line(place, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("header") / "s"
    shutil.copytree(place / "a" / "s", folder)
    content = (folder / "shard-00001.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "revelio", "other"]))
    value = data.draw(st.sampled_from([*JUNK, "F16", "I64", [2, 2], [4], [0, 8], [8, 8]]))
    whole = (
        header[name] == header[name] | {field: value} if isinstance(value, str | list) else False
    )
    header[name] = header[name] | {field: value}
    raw = json.dumps(header).encode()
    reseal(folder, 1, struct.pack("<Q", len(raw)) + raw + content[8 + length :])
    one_line(lambda: open_and_read(folder), "shard-00001.safetensors")
    if whole:
        open_and_read(folder)


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_what_is_no_file_of_the_store_is_left_alone(tmp_path, kind):
    """A link, a folder or a pipe in a shard's place: named, neither followed nor replaced."""
    dataset, run = memory_dataset(11), SETTINGS | {"timesteps": (25,), "draws": 1}
    extract(dataset, FakeBackbone(), tmp_path / "out", **run)
    folder = tmp_path / "out" / "deep-t25-empty-d0"
    shard = folder / "shard-00001.safetensors"
    precious = tmp_path / "precious.safetensors"
    shard.rename(precious)
    before = precious.read_bytes()
    if kind == "folder":
        shard.mkdir()
        (shard / "mine.txt").write_text("mine")
    elif kind == "pipe":
        os.mkfifo(shard)
    else:
        shard.symlink_to(precious if kind == "link" else tmp_path / "absent")
    for unfinished in (False, True):
        if unfinished:
            manifest = json.loads((folder / "manifest.json").read_text())
            for name in ("rows", "row_shape", "labelled", "skipped", "shards", "format"):
                del manifest[name]
            (folder / "unfinished.json").write_text(json.dumps(manifest))
            (folder / "manifest.json").unlink()
        else:
            with pytest.raises(
                ValueError, match=r"shard-00001\.safetensors (is a link|is not a reg)"
            ):
                ActivationStore.open(folder)
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors (is a link|is not a reg)"):
            extract(dataset, FakeBackbone(), tmp_path / "out", resume=True, **run)
    assert precious.read_bytes() == before
    assert kind != "folder" or (shard / "mine.txt").read_text() == "mine"


def test_an_edited_manifest_deletes_nothing_on_resume(tmp_path):
    """The case that was found, through the extraction itself and through a shared latent cache."""
    dataset, run = memory_dataset(11), SETTINGS | {"timesteps": (25,), "draws": 1}
    extract(dataset, FakeBackbone(), tmp_path / "out", vae_cache=tmp_path / "z0", **run)
    precious = tmp_path / "precious.txt"
    for folder in (tmp_path / "out" / "deep-t25-empty-d0", tmp_path / "z0"):
        whole = (folder / "manifest.json").read_text()
        for name in ("../../precious.txt", "../precious.txt", str(precious)):
            precious.write_text("mine")
            manifest = json.loads(whole)
            manifest["shards"][1]["file"] = name
            (folder / "manifest.json").write_text(json.dumps(manifest))
            with pytest.raises(ValueError, match=r"manifest\.json has no usable `file`"):
                extract(
                    dataset, FakeBackbone(), tmp_path / "out", vae_cache=tmp_path / "z0", resume=True,
                    **run,
                )  # fmt: skip
            assert precious.read_text() == "mine"
        (folder / "manifest.json").write_text(whole)


def test_only_our_own_temporary_files_are_swept(tmp_path, monkeypatch):
    dataset, run = memory_dataset(5), SETTINGS | {"timesteps": (25,), "draws": 1}
    extract(dataset, FakeBackbone(), tmp_path, **run)
    folder = tmp_path / "deep-t25-empty-d0"
    (folder / "shard-00001.safetensors").unlink()
    (folder / ".thesis.partial").write_text("mine")
    (folder / ".manifest.json.7.partial").mkdir()
    (folder / ".shard-00001.safetensors.7.partial").write_text("left by a kill")
    extract(dataset, FakeBackbone(), tmp_path, resume=True, **run)
    assert (folder / ".thesis.partial").read_text() == "mine"
    assert not (folder / ".shard-00001.safetensors.7.partial").exists()
    # Left by a kill after the manifest was written: the store is finished.
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    monkeypatch.setattr(os, "getpid", lambda: child.pid)
    left = partial_path(folder / "manifest.json")
    monkeypatch.undo()
    left.write_text("half")
    extract(dataset, FakeBackbone(), tmp_path, resume=True, **run)
    assert not left.exists()


@pytest.mark.parametrize(
    "name", ["", "/etc", "../a", "a/s", "somebody/else", "folder", "./samples"]
)
def test_a_store_does_not_choose_which_files_a_gallery_reads(place, tmp_path, name, monkeypatch):
    monkeypatch.chdir(place)
    write_store(tmp_path / "s", torch.ones(1, 2), ["x"], settings={"dataset": name})
    store = ActivationStore.open(tmp_path / "s")
    with pytest.raises(
        ValueError, match=r"does not say where its images .* are: give their source"
    ):
        pictures_of(DataConfig(source=FROM_STORE), store)
