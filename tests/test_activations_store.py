"""Stores: what is written comes back; what is cut, edited or of another format does not."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from files_helpers import contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from revelio.activations.manifest import UNFINISHED
from revelio.activations.store import ActivationStore, write_manifest, write_shard, write_store

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@st.composite
def stores(draw):
    count = draw(st.integers(1, 12))
    shape = draw(st.sampled_from([(1,), (5,), (2, 3, 3)]))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    values = torch.randn(count, *shape, generator=torch.Generator().manual_seed(count)).to(dtype)
    ids = draw(st.lists(st.text(max_size=8), min_size=count, max_size=count))
    labels = draw(st.none() | st.lists(st.integers(0, 2**20 - 1), min_size=count, max_size=count))
    return values, ids, labels, draw(st.integers(1, 5))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(made=stores(), data=st.data())
def test_round_trip(tmp_path_factory, made, data):
    values, ids, labels, shard_rows = made
    folder = tmp_path_factory.mktemp("store") / "s"
    store = write_store(folder, values, ids, labels, shard_rows=shard_rows)
    assert len(store) == len(values) and store.row_shape == tuple(values.shape[1:])
    assert store.ids == ids
    assert (store.labels is None) == (labels is None)
    if labels is not None:
        assert store.labels.tolist() == labels and store.labels.dtype == torch.int64
    assert torch.equal(store.tensor(), values.float()) and store.tensor().dtype == torch.float32
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    rows = store.rows(start, stop)
    assert rows.dtype == values.dtype and torch.equal(rows, values[start:stop])
    batch_size = data.draw(st.integers(1, 7))
    parts = list(store.batches(batch_size))
    assert [part[0] for part in parts] == list(range(0, len(values), batch_size))
    assert torch.equal(torch.cat([part[1] for part in parts]), values)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 40),
    shard_rows=st.integers(1, 9),
    batch_size=st.integers(1, 9),
    buffer_rows=st.integers(1, 50),
    seed=st.integers(0, 5),
)
def test_shuffled_batches_give_each_row_once(
    tmp_path_factory, count, shard_rows, batch_size, buffer_rows, seed
):
    folder = tmp_path_factory.mktemp("store") / "s"
    values = torch.arange(count * 2.0).view(count, 2)
    store = write_store(folder, values, [str(i) for i in range(count)], shard_rows=shard_rows)
    once = list(store.batches(batch_size, seed, buffer_rows=buffer_rows))
    again = list(store.batches(batch_size, seed, buffer_rows=buffer_rows))
    indices = torch.cat([part[0] for part in once])
    assert sorted(indices.tolist()) == list(range(count))
    assert torch.equal(torch.cat([part[1] for part in once]), values[indices])
    assert torch.equal(indices, torch.cat([part[0] for part in again]))
    assert [len(part[1]) for part in once[:-1]] == [batch_size] * (len(once) - 1)


def test_a_small_store_is_shuffled_uniformly(tmp_path):
    store = write_store(tmp_path / "s", torch.zeros(4, 1), list("abcd"), shard_rows=2)
    first = [next(store.batches(1, seed))[0].item() for seed in range(400)]
    for row in range(4):
        assert 70 <= first.count(row) <= 130
    orders = {
        tuple(int(i) for part, _ in store.batches(2, seed) for i in part) for seed in range(400)
    }
    assert len(orders) == 24


def test_files_are_as_the_format_says(tmp_path):
    """Read by hand, without the reader."""
    folder = tmp_path / "s"
    values = torch.arange(10.0).view(5, 2)
    names = ["a/é.png", "\udcff.png", 'q"\n', "", "e"]
    write_store(folder, values, names, [4, 3, 2, 1, 0], shard_rows=3, settings={"layer": "x"})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["rows"] == 5 and manifest["layer"] == "x"
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 2]
    for shard, rows, part in zip(
        manifest["shards"], (values[:3], values[3:]), (names[:3], names[3:]), strict=True
    ):
        whole = (folder / shard["file"]).read_bytes()
        assert sha256(whole).hexdigest() == shard["sha256"] and len(whole) == shard["bytes"]
        tensors = load_file(folder / shard["file"])
        assert set(tensors) == {"activations", "ids", "labels"}
        assert torch.equal(tensors["activations"], rows)
        assert json.loads(bytes(tensors["ids"].tolist())) == part
    assert sorted(contents(folder)) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


@pytest.fixture
def folder(tmp_path):
    values = torch.arange(12.0).view(6, 2)
    write_store(tmp_path / "s", values, list("abcdef"), [0] * 6, shard_rows=2)
    return tmp_path / "s"


def test_a_cut_shard_is_named_when_the_store_is_opened(folder):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors was cut or edited"):
        ActivationStore.open(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is missing"):
        ActivationStore.open(folder)


def test_an_edited_shard_is_named_when_its_rows_are_read(folder):
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # in the activations: the ids come last
    path.write_bytes(content)
    store = ActivationStore.open(folder)
    assert torch.equal(store.rows(0, 2), torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    for read in (lambda: store.rows(1, 3), lambda: store.ids, lambda: store.labels, store.verify):
        with pytest.raises(ValueError, match=r"shard-00001.safetensors was edited"):
            read()
    assert len(ActivationStore.open(folder, verify=False).ids) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3; this version of Revelio reads formats 1 and 2"),
        ({"rows": 7}, "row counts don't add up"),
        ({"shards": None}, "no usable `shards`"),
        ({"dtype": "float16"}, "disagrees with the store's manifest"),
        ({"row_shape": [3]}, "disagrees with the store's manifest"),
    ],
)
def test_a_wrong_manifest_is_refused(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        ActivationStore.open(folder).rows(0, 1)


def test_what_is_no_store_is_refused_with_what_to_do(tmp_path, folder):
    with pytest.raises(ValueError, match="no activation store at"):
        ActivationStore.open(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds several stores: name one of s inside"):
        ActivationStore.open(tmp_path)
    (folder / "manifest.json").rename(folder / UNFINISHED)
    with pytest.raises(ValueError, match=r"not finished: go on .* resume"):
        ActivationStore.open(folder)
    (folder / UNFINISHED).unlink()
    with pytest.raises(ValueError, match=r"holds no manifest.json"):
        ActivationStore.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ActivationStore.open(folder)


def test_rows_outside_the_store_are_refused(folder):
    store = ActivationStore.open(folder)
    for start, stop in ((-1, 2), (3, 2), (0, 7)):
        with pytest.raises(ValueError, match="outside 0:6"):
            store.rows(start, stop)
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(store.batches(0))
    assert store.rows(6, 6).shape == (0, 2)


def test_a_shard_whose_images_were_all_skipped(tmp_path):
    folder = tmp_path / "s"
    write_shard(folder, 0, torch.empty(0), [], [], [("a", "cut"), ("b", "empty")])
    write_shard(folder, 1, torch.ones(2, 3), ["c", "d"], [5, 6])
    write_shard(folder, 2, torch.empty(0), [], [], [("e", "gone")])
    manifest = write_manifest(folder, {}, 3)
    store = ActivationStore.open(folder)
    assert store.ids == ["c", "d"] and store.labels.tolist() == [5, 6]
    assert torch.equal(store.tensor(), torch.ones(2, 3))
    assert len(list(store.batches(5, 0))) == 1
    assert manifest["skipped"] == [["a", "cut"], ["b", "empty"], ["e", "gone"]]


def test_a_store_of_no_rows_is_not_closed(tmp_path):
    write_shard(tmp_path, 0, torch.empty(0), [], None, [("a", "cut")])
    with pytest.raises(ValueError, match="not one image could be read"):
        write_manifest(tmp_path, {}, 1)
    with pytest.raises(ValueError, match="is missing"):
        write_manifest(tmp_path, {}, 2)
    write_shard(tmp_path, 0, torch.ones(1, 2), ["a"])
    write_shard(tmp_path, 1, torch.ones(1, 3), ["b"])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors differs"):
        write_manifest(tmp_path, {}, 2)
    assert not (Path(tmp_path) / "manifest.json").exists()
