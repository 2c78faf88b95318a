"""Data sets that somebody else made: bounded, kept to their folder, of one meaning, whatever their names."""

import gzip
import json
import os
import struct
import warnings
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_helpers import blank_png, noise_picture, png, write_class_folders
from datasets.table import InMemoryTable
from PIL import Image

from revelio import cli
from revelio.activations.store import ActivationStore
from revelio.data.dataset import ImageError
from revelio.data.loading import batches
from revelio.data.open import open_dataset
from revelio.data.picture import BYTES_A_PIXEL, LIMITS, read_picture
from revelio.data.sources.folder import open_folder
from revelio.data.sources.idx import read_idx
from revelio.data.transforms import SquareTransform

NASTY = [
    b"\xff\xfe.png", b"caf\xe9.png", b"\x1b[2J\x1b]0;owned\x07.png", b"new\nline.png", b"tab\t.png",
    "schön 🐈.png".encode(), b" space .png", b"'quote\".png", b"%s{}<b>&amp;.png", b"-rf.png", b"a\\b.png",
    b"\xe2\x80\xae.png", b"\xed\xb3\xbf.png", b"n" * 240 + b".png",
]  # fmt: skip

MOST_BYTES = BYTES_A_PIXEL * LIMITS.max_pixels


@pytest.mark.parametrize(
    ("width", "height", "said"),
    [
        (1, 2_000_000, "sides beyond"),
        (2_000_000, 1, "sides beyond"),
        (7, 7 * LIMITS.max_ratio + 1, "sides beyond"),
        (12_000, 12_000, "pixels, more than"),
        (20_000, 20_000, "pixels"),
    ],
)
def test_pictures_out_of_proportion_are_refused_before_they_are_decoded(width, height, said):
    content = blank_png(width, height)
    assert len(content) < 100_000
    with pytest.raises(ImageError, match=f"image x can't be read: .*{said}"):
        read_picture(content, "x")


def test_pictures_at_the_limits_are_read():
    assert LIMITS.max_pixels >= 8192 * 8192
    assert read_picture(blank_png(7, 7 * LIMITS.max_ratio), "x").size == (7, 700)
    pixels = SquareTransform(16)(read_picture(blank_png(700, 7), "x"))
    assert pixels.shape == (3, 16, 16)


def test_only_regular_files_are_opened(tmp_path):
    write_class_folders(tmp_path / "set", {"a": 2, "b": 1})
    os.mkfifo(tmp_path / "set" / "a" / "pipe.png")
    (tmp_path / "set" / "b" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "set" / "b" / "gone.png").symlink_to(tmp_path / "gone")
    with (tmp_path / "set" / "b" / "huge.png").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    dataset = open_folder(tmp_path / "set")
    (batch,) = batches(dataset, SquareTransform(4), 9, on_error="skip")
    assert batch.ids == ["a/0.png", "a/1.png", "b/0.png"]
    assert dict(batch.skipped) == {
        "a/pipe.png": "it is not a regular file",
        "b/gone.png": "no such file or directory",
        "b/huge.png": f"its file has {MOST_BYTES + 1} bytes, more than {MOST_BYTES}",
        "b/zero.png": "it is not a regular file",
    }
    assert len(dataset.digests() or []) == 7
    with pytest.raises(ImageError, match=r"a/pipe\.png"):
        list(batches(dataset, SquareTransform(4), 9))


def named_rows(tmp_path: Path, names: list[str | None], kind: str) -> Path:
    """A data set whose rows name files instead of holding them."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    values = [{"bytes": None, "path": name} for name in names]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"image": values}), folder / "x.parquet")
        return folder / "x.parquet"
    rows = datasets.Dataset(InMemoryTable(pyarrow.table({"image": values})))
    rows.save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_rows_name_only_files_of_their_own_folder(tmp_path, monkeypatch, kind):
    secret = tmp_path / "secret.png"
    noise_picture(4, 4).save(secret)
    monkeypatch.chdir(tmp_path)
    inner = tmp_path / "foreign" / "inner.png"
    names = [
        str(secret), "../secret.png", "secret.png", "inner/../../secret.png", "link.png", "file://secret.png",
        f"/proc/self/cwd/{secret.name}", "\0", "", None, ".", "inner.png", str(inner),
    ]  # fmt: skip
    place = named_rows(tmp_path, names, kind)
    noise_picture(4, 4, 1).save(inner)
    (tmp_path / "foreign" / "link.png").symlink_to(secret)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "parquet":
            with pytest.raises(ValueError, match=r"parquet files .* and pictures"):
                open_dataset(place.parent)
        dataset = open_dataset(place)
    for index in range(len(names) - 2):
        with pytest.raises(ImageError) as caught:
            dataset.read(index)
        assert str(caught.value).isprintable()
    for index in (-2, -1):
        found = dataset.read(len(names) + index)
        assert found.tobytes() == noise_picture(4, 4, 1).tobytes()
    found = dataset.digests()
    assert found is not None and set(found[:-2]) == {"unreadable"} and found[-1] == found[-2]


@pytest.mark.parametrize(
    "name", ["../other.arrow", "/etc/hostname", "a/b.arrow", 3, None, "link.arrow"]
)
def test_saved_sets_name_only_their_own_data_files(tmp_path, name):
    rows = datasets.Dataset.from_dict({"label": [0]})
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "link.arrow").symlink_to("/etc/hostname")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(
        json.dumps(state | {"_data_files": [{"filename": name}]})
    )
    with pytest.raises(ValueError, match=r"only a file of this folder|is a link"):
        open_dataset(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["../saved"]}))
    with pytest.raises(ValueError, match="only a file of this folder"):
        open_dataset(tmp_path / "saved")


@pytest.mark.parametrize("place", ["x.parquet", "cats/x.parquet", "data/train-0.parquet"])
def test_parquet_beside_pictures_is_refused(tmp_path, place):
    write_class_folders(tmp_path, {"cats": 2, "dogs": 1})
    (tmp_path / place).parent.mkdir(exist_ok=True)
    table = pyarrow.table({"image": [png(noise_picture(4, 4))] * 3})
    pyarrow.parquet.write_table(table, tmp_path / place)
    with pytest.raises(ValueError, match=rf"parquet files \({place}, .* pictures \(cats/0\.png, "):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path / place)) == 3


def test_a_saved_set_beside_pictures_is_said(tmp_path):
    write_class_folders(tmp_path, {"cats": 2, "dogs": 1})
    table = pyarrow.table({"image": [{"bytes": None, "path": "dogs/0.png"}]})
    datasets.Dataset(InMemoryTable(table)).save_to_disk(str(tmp_path))
    with pytest.warns(UserWarning, match=r"a saved data set .* pictures \(cats/0\.png, .*: only"):
        dataset = open_dataset(tmp_path)
    assert dataset.read(0).getpixel((0, 0)) == (1, 0, 0)


@pytest.mark.parametrize("label", [-2, -(2**40)])
def test_negative_class_numbers_are_refused(tmp_path, label):
    table = pyarrow.table({"image": [png(noise_picture(4, 4))] * 2, "label": [0, label]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="holds no classes"):
        open_dataset(tmp_path / "x.parquet")


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_with_and_without_a_byte_order_mark(tmp_path, start, end):
    write_class_folders(tmp_path / "images", {"a": 2, "b": 3})
    text = start + end.join(["b/2.png", "a/0.png", ""])
    (tmp_path / "train.txt").write_bytes(text.encode())
    assert open_folder(tmp_path).ids == ["a/0.png", "b/2.png"]


def test_lists_lead_nowhere_else(tmp_path):
    write_class_folders(tmp_path / "images", {"a": 1})
    noise_picture(4, 4).save(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"):
        (tmp_path / "train.txt").write_text(f"a/0.png\n{name}\n")
        with pytest.raises(ValueError, match=r"train\.txt lists 1 picture that is not under"):
            open_folder(tmp_path)
    (tmp_path / "train.txt").write_bytes(b"\xff\xfea\0")
    with pytest.raises(ValueError, match=r"train\.txt is not UTF-8"):
        open_folder(tmp_path)


def test_links_put_no_picture_under_another_class(tmp_path):
    root = tmp_path / "set"
    write_class_folders(root, {"cats": 2, "dogs": 2})
    write_class_folders(tmp_path / "pool", {"extra": 1})
    whole = ["cats/0.png", "cats/1.png", "dogs/0.png", "dogs/1.png"]
    (root / "cats" / "more").symlink_to(tmp_path / "pool" / "extra")
    assert open_folder(root).ids == sorted([*whole, "cats/more/0.png"])
    (root / "cats" / "more").unlink()
    for target in ("..", "../..", "../dogs", "/"):
        (root / "cats" / "up").symlink_to(target)
        with pytest.warns(UserWarning, match=r"cats/up is a link to .*: it is left out"):
            assert open_folder(root).ids == whole
        (root / "cats" / "up").unlink()
    (root / "cats" / "self").symlink_to(".")
    assert open_folder(root).ids == whole
    for target, said in (
        (".", "holds all classes"),
        ("..", "holds all"),
        ("cats", "same pictures"),
    ):
        (root / "owls").symlink_to(target)
        with pytest.raises(ValueError, match=said):
            open_folder(root)
        (root / "owls").unlink()


def test_class_folders_out_of_a_pool_may_be_links(tmp_path):
    write_class_folders(tmp_path / "pool", {"cats": 2, "dogs": 1, "dogs-2": 1})
    (tmp_path / "set").mkdir()
    for name in ("cats", "dogs", "dogs-2"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "pool" / name)
    assert open_folder(tmp_path / "set").labels == [0, 0, 2, 1]
    (tmp_path / "pool" / "cats" / "x").symlink_to(tmp_path / "pool" / "dogs")
    with pytest.warns(UserWarning, match="listed on their own"):
        assert len(open_folder(tmp_path / "set")) == 4


@pytest.mark.parametrize("place", ["stray.png", "train/stray.png", "test/stray.png"])
def test_stray_pictures_among_splits_are_refused(tmp_path, place):
    write_class_folders(tmp_path / "train", {"a": 1, "b": 1})
    write_class_folders(tmp_path / "test", {"a": 1, "b": 1})
    noise_picture(4, 4).save(tmp_path / place)
    with pytest.raises(ValueError, match=r"holds pictures \(stray\.png, .*\) beside its folders"):
        open_folder(tmp_path)


@pytest.mark.parametrize("shape", [(2**31, 2), (10**6, 28, 28), (60000, 28, 28), ()])
def test_idx_files_unpack_to_what_they_state(tmp_path, shape):
    path = tmp_path / "x.gz"
    sides = struct.pack(f">{len(shape)}I", *shape)
    with gzip.open(path, "wb") as file:
        file.write(bytes([0, 0, 8, len(shape)]) + sides)
        for _ in range(8):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match=r"x\.gz is cut"):
        read_idx(path)


def test_any_name_survives_from_listing_to_store_and_gallery(tmp_path, capsys, monkeypatch):
    folder = os.fsencode(tmp_path / "set")
    for number, raw in enumerate(NASTY):
        place = os.path.join(folder, (b"caf\xe9", b"\x1b[31mred")[number % 2], raw)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as file:
            file.write(b"no picture" if number in (2, 3) else png(noise_picture(20, 20, number)))
    monkeypatch.chdir(tmp_path)
    run = [
        "--out",
        "out",
        "--layers",
        "bottleneck",
        "--data.source",
        "set",
        "--data.on-error",
        "skip",
    ]
    for again in ([], ["--resume"]):
        cli.main(["extract", *run, *again])
        said = capsys.readouterr().out
        assert said.replace("\n", "").isprintable() and "skipped" in said
    store = ActivationStore.open(tmp_path / "out" / "bottleneck-t25-empty-d0")
    names = [*store.ids, *(name for name, _ in store.manifest["skipped"])]
    wanted = [os.path.join((b"caf\xe9", b"\x1b[31mred")[n % 2], raw) for n, raw in enumerate(NASTY)]
    assert sorted(map(os.fsencode, names)) == sorted(wanted)
    assert sorted(map(os.fsencode, store.classes)) == [b"\x1b[31mred", b"caf\xe9"]
    assert store.labels is not None and store.labels.bincount().tolist() == [6, 6]
    flags = [
        "--epochs",
        "1",
        "--expansion",
        "2",
        "--k",
        "2",
        "--batch-size",
        "4",
        "--kernel",
        "torch",
    ]
    cli.main(["train-ksae", "--store", str(store.path), "--out", "ksae", *flags])
    top = ["--ksae", "ksae/final", "--store", str(store.path), "--out", "top"]
    cli.main(["top-images", *top])
    cli.main(["gallery", *top[:4], "--out", "pages", "--data.source", "set", "--map-method", "pca"])
    assert capsys.readouterr().out.replace("\n", "").isprintable()
    pages = "".join(path.read_text() for path in (tmp_path / "pages").rglob("*.js"))
    assert "\x1b" not in pages and "\\udce9" in pages


def test_the_line_that_names_a_file_is_safe_for_a_terminal(tmp_path, capsys):
    folder = os.fsencode(tmp_path / "set")
    os.makedirs(folder)
    with open(os.path.join(folder, b"\x1b[2J\xff.png"), "wb") as file:
        file.write(b"no picture")
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["extract", "--out", str(tmp_path / "out"), "--data.source", str(tmp_path / "set")]
        )
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "\x1b" not in said
    assert said.splitlines()[-1].startswith("revelio: image \\x1b[2J\\udcff.png can't be read")


def test_batches_of_long_pictures_stay_small():
    """The shorter side is brought to the model's size; the longer may grow to so many times that."""
    image = Image.new("RGB", (LIMITS.max_ratio * 3, 3), (9, 8, 7))
    assert torch.equal(SquareTransform(8)(image), SquareTransform(8)(image.crop((0, 0, 3, 3))))
