"""Folders as people have them: splits by any name, wrappers, thumbnails, lists of labels, odd files."""

import json
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_helpers import noise_picture, write_class_folders
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from revelio.data import picture
from revelio.data.loading import batches
from revelio.data.open import open_dataset
from revelio.data.sources.folder import open_folder
from revelio.data.splits import choose_split, split_name
from revelio.data.transforms import SquareTransform

# (the folders, the split that each is)
SPLITS = [
    (("train", "test"), ("train", "test")),
    (("Train", "Test"), ("train", "test")),
    (("TRAIN", "VAL"), ("train", "val")),
    (("Training", "Testing"), ("train", "test")),
    (("seg_train", "seg_test"), ("train", "test")),
    (("train", "dev"), ("train", "dev")),
    (("train", "eval"), ("train", "eval")),
    (("Training", "Validation", "Test_set"), ("train", "validation", "test")),
    (("train2017", "val2017"), ("train", "val")),
    (("train_images", "test-images"), ("train", "test")),
]


@pytest.mark.parametrize(("folders", "names"), SPLITS)
def test_split_folders_are_known_by_any_of_their_names(tmp_path: Path, folders, names) -> None:
    for place, folder in enumerate(folders):
        write_class_folders(tmp_path / folder, {"a": 1 + place, "b": 1})
    whole = open_folder(tmp_path)
    assert (whole.split, whole.classes, len(whole)) == ("train", ("a", "b"), 2)
    for place, (folder, name) in enumerate(zip(folders, names, strict=True)):
        for asked in (folder, name):
            part = open_folder(tmp_path, split=asked)
            assert part.split == name and len(part) == 2 + place
            assert all(image.startswith(f"{folder}/") for image in part.ids)


@given(st.sampled_from([name for folders, _ in SPLITS for name in folders]), st.data())
@settings(deadline=None)
def test_case_never_matters_and_other_words_are_no_splits(name: str, data) -> None:
    flips = data.draw(st.lists(st.booleans(), min_size=len(name), max_size=len(name)))
    other = "".join(c.upper() if up else c.lower() for c, up in zip(name, flips, strict=True))
    assert split_name(other) == split_name(name) is not None
    for word in (f"{name}er", f"my{name}", f"{name} of thought", "trained", "contest", "tested"):
        assert split_name(word) is None


def test_a_split_that_says_the_same_is_taken() -> None:
    assert choose_split(["Training", "Testing"], None, "x") == "Training"
    assert choose_split(["train", "dev"], "validation", "x") == "dev"
    with pytest.raises(ValueError, match="no split 'test': choose from train, dev, all"):
        choose_split(["train", "dev"], "test", "x")


def test_splits_beside_other_folders(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        write_class_folders(tmp_path / folder, {"a": 2, "b": 1})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "boxes.json").write_text("[]")
    assert open_folder(tmp_path).split == "train"  # a folder without pictures is none of theirs
    write_class_folders(tmp_path, {"pred": 1})
    with pytest.raises(ValueError, match=r"look like splits \(test, train\) beside .*\(pred"):
        open_folder(tmp_path)
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(ValueError, match=r"look like splits \(train\)"):  # it holds class folders
        open_folder(tmp_path)


def test_a_class_called_train_is_a_class_and_said(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"bus": 1, "train": 2, "car": 1})
    with pytest.warns(UserWarning, match=r"train is taken as a class, like bus"):
        assert open_folder(tmp_path).classes == ("bus", "car", "train")


def test_one_split_in_two_folders_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "test", {"a": 1})
    write_class_folders(tmp_path / "Testing", {"a": 1})
    with pytest.raises(ValueError, match="two folders for the split test, Testing and test"):
        open_folder(tmp_path)


@pytest.mark.parametrize("wrappers", ["archive", "archive/archive", "a b/c.d/e"])
def test_an_archives_own_folder_is_no_class(tmp_path: Path, wrappers: str) -> None:
    inside = tmp_path / wrappers
    write_class_folders(inside, {"cats": 2, "dogs": 1})
    (tmp_path / "__MACOSX").mkdir()
    dataset = open_dataset(tmp_path)
    assert dataset.classes == ("cats", "dogs") and dataset.labels == [0, 0, 1]
    assert dataset.ids == open_folder(inside).ids and dataset.name == tmp_path.name
    assert dataset.read(2).getpixel((0, 0))[:2] == (1, 0)
    shutil.rmtree(inside)
    for split in ("seg_train", "seg_test"):
        write_class_folders(inside / split / split, {"cats": 1, "dogs": 1})
    assert open_folder(tmp_path, split="test").ids == [
        *("seg_test/seg_test/cats/0.png", "seg_test/seg_test/dogs/0.png")
    ]


def test_a_known_sets_archive_may_be_wrapped(tmp_path: Path) -> None:
    inside = tmp_path / "caltech-101"
    write_class_folders(inside / "images", {"ant": 2, "bee": 1})
    (inside / "train.txt").write_text("ant/0.png\nbee/0.png\n", encoding="utf-8-sig")
    (inside / "test.txt").write_text("ant/1.png\r\n", encoding="utf-8-sig")
    assert open_dataset("caltech101", root=tmp_path).ids == ["ant/0.png", "bee/0.png"]
    assert open_dataset("caltech101", root=tmp_path, split="test").ids == ["ant/1.png"]


def test_one_class_alone_is_warned_about(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cats": 2})
    with pytest.warns(UserWarning, match=r"all images are of one class \(cats\)"):
        assert open_dataset(tmp_path).labels == [0, 0]


def test_pictures_are_known_by_name_or_content_and_the_rest_is_counted(tmp_path: Path) -> None:
    shown = noise_picture(6, 6)
    for name, kind in [
        *(("a.jfif", "JPEG"), ("b.JPE", "JPEG"), ("c", "PNG"), ("d.img", "PNG")),
        *(("e.ico", "ICO"), ("f.dib", "DIB"), ("g.pcx", "PCX")),
    ]:
        shown.save(tmp_path / name, kind)
    for name in ("1.heic", "2.HEIC", "noise", "clip.mp4"):
        (tmp_path / name).write_bytes(b"not a picture at all" * 9)
    shown.save(tmp_path / "3.dds", "DDS")  # which Pillow reads, and Revelio does not
    shown.resize((3, 3)).save(
        tmp_path / "4.NEF", "TIFF"
    )  # a camera's thumbnail before its raw data
    for name in ("notes.txt", "labels.csv", ".hidden.png", "README", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match="left out") as said:
        dataset = open_folder(tmp_path)
    assert list(dataset.ids) == ["a.jfif", "b.JPE", "c", "d.img", "e.ico", "f.dib", "g.pcx"]
    assert all(dataset.read(index).size == (6, 6) for index in range(7))
    [message] = [str(one.message) for one in said]
    for part in (
        "6 files left out: 2 .heic (1.heic, ...: needs the package pillow-heif)",
        "1 .dds (3.dds: the format DDS is not read: convert it)",
        "1 .mp4 (clip.mp4: holds no picture)",
        "1 .nef (4.NEF: a camera's raw data: convert it)",
        "1 without a suffix (noise: holds no picture)",
    ):
        assert part in message


def test_a_plug_in_of_pillow_brings_its_format(tmp_path: Path, monkeypatch) -> None:
    def register() -> None:
        Image.register_open("HEIF", PngImagePlugin.PngImageFile, lambda start: start[:4] == b"heic")
        Image.register_extension("HEIF", ".heic")

    for table in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, table, dict(getattr(Image, table)))
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    picture._register_plugins.cache_clear()
    noise_picture(4, 4).save(tmp_path / "a.heic", "PNG")
    assert open_folder(tmp_path).ids == ["a.heic"]
    picture._register_plugins.cache_clear()


def test_service_folders_are_passed_over(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cats": 1, "dogs": 1})
    for folder in ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "cats/@eaDir/0.png", "#recycle"):
        (tmp_path / folder).mkdir(parents=True)
        noise_picture(4, 4).save(tmp_path / folder / "thumb.jpg")
    assert open_folder(tmp_path).ids == ["cats/0.png", "dogs/0.png"]


def labelled(folder: Path, rows: list[dict], kind: str) -> None:
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(folder / "metadata.parquet")
        return
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        names = list(rows[0])
        text = "\r\n".join(
            [",".join(names), *(",".join(str(row[n]) for n in names) for row in rows)]
        )
    (folder / f"metadata.{kind}").write_text(text, encoding="utf-8-sig")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_of_image_folders_gives_the_labels(tmp_path: Path, kind: str) -> None:
    for number in range(12):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [
        {
            "file_name": f"{n}.png",
            "text": f"picture {n}",
            "label": "bird" if n % 3 else "ant",
            "age": n,
        }
        for n in range(11)
    ]
    labelled(tmp_path, rows, kind)
    with pytest.warns(UserWarning, match=r"1 picture is left out.*\(11\.png, "):
        dataset = open_dataset(tmp_path)
    assert dataset.classes == ("ant", "bird") and len(dataset) == 11
    for index in range(11):
        number = dataset.read(index).getpixel((0, 0))[0]
        assert dataset.classes[dataset.labels[index]] == rows[number]["label"]
    with pytest.warns(UserWarning, match="left out"):
        ages = open_dataset(tmp_path, label_column="age")
    assert ages.classes == tuple(map(str, range(11)))  # as numbers: 10 after 9
    with pytest.raises(ValueError, match="label_column is 'species'"), pytest.warns(UserWarning):
        open_dataset(tmp_path, label_column="species")
    labelled(tmp_path, [*rows, {**rows[0], "file_name": "../gone.png"}], kind)
    with pytest.raises(ValueError, match=r"names 1 picture that is not there.*\.\./gone\.png"):
        open_dataset(tmp_path)


def test_two_labels_for_one_picture_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        noise_picture(4, 4).save(tmp_path / f"{name}.png")
    row, other = {"file_name": "a.png", "label": "cat"}, {"file_name": "b.png", "label": "owl"}
    labelled(tmp_path, [row, other, row], "csv")  # twice the same says nothing else
    assert open_dataset(tmp_path).classes == ("cat", "owl")
    labelled(tmp_path, [row, other, {**row, "label": "dog"}], "csv")
    with pytest.raises(ValueError, match=r"gives a\.png the label dog, and cat stood before"):
        open_dataset(tmp_path)
    labelled(tmp_path, [row, other], "csv")
    labelled(tmp_path, [{**row, "file_name": "./a.png", "label": "dog"}], "jsonl")
    with pytest.raises(ValueError, match=r"metadata\.jsonl gives a\.png the label dog"):
        open_dataset(tmp_path)


def test_an_empty_label_is_none_and_no_class(tmp_path: Path) -> None:
    for name in "ab":
        noise_picture(4, 4).save(tmp_path / f"{name}.png")
    rows = [{"file_name": "a.png", "label": "cat"}, {"file_name": "b.png", "label": ""}]
    labelled(tmp_path, rows, "csv")
    with pytest.raises(ValueError, match="row 1 has no label but others do"):
        open_dataset(tmp_path)
    labelled(tmp_path, [row | {"label": ""} for row in rows], "csv")
    assert open_dataset(tmp_path).labels is None


def test_metadata_of_splits_and_of_captions(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / split).mkdir()
        rows = [{"file_name": f"{n}.png", "label": n % 2} for n in range(count)]
        for row in rows:
            noise_picture(4, 4).save(tmp_path / split / row["file_name"])
        labelled(tmp_path / split, rows, "csv")
    assert open_dataset(tmp_path, split="test").labels == [0, 1]
    assert open_dataset(tmp_path).labels == [0, 1, 0]
    write_class_folders(tmp_path / "other", {"a": 1, "b": 1})
    labelled(tmp_path / "other", [{"file_name": "a/0.png", "text": "an a"}], "csv")
    with pytest.warns(UserWarning, match=r"no column 'label' \(file_name, text\)"):
        assert open_dataset(tmp_path / "other").classes == ("a", "b")
    with pytest.raises(ValueError, match=r"no metadata\.csv or metadata\.jsonl"):
        open_dataset(tmp_path / "other" / "a", label_column="label")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_two_labels_of_a_picture_are_refused_and_the_same_one_twice_is_taken(
    tmp_path: Path, kind: str
) -> None:
    write_class_folders(tmp_path, {"a": 2, "in": 1})
    rows = [
        {"file_name": name, "label": label}
        for name, label in (("a/0.png", "cat"), ("a/1.png", "dog"), ("in/0.png", "cat"))
    ]
    labelled(tmp_path, [*rows, {"file_name": "a/./0.png", "label": "cat"}], kind)
    dataset = open_dataset(tmp_path)
    assert [dataset.classes[label] for label in dataset.labels or []] == ["cat", "dog", "cat"]
    labelled(tmp_path, [*rows, {"file_name": "a/./0.png", "label": "dog"}], kind)
    with pytest.raises(ValueError, match=r"gives a/0\.png the label dog, and cat stood before"):
        open_dataset(tmp_path)
    # In two files just as in one.
    labelled(tmp_path, rows, kind)
    labelled(tmp_path / "in", [{"file_name": "0.png", "label": "dog"}], kind)
    with pytest.raises(ValueError, match=r"in/metadata\.\w+ gives in/0\.png the label dog"):
        open_dataset(tmp_path)


# (pictures, the metadata file, the names' places in it)
NESTED = [
    (("train/a/x/1.png", "train/a/y/2.png"), "train"),
    (("data/a/1.png", "data/b/2.png"), ""),
    (("w/v/a/1.png", "w/v/b/2.png"), "w"),
    (("train/a/1.png", "train/a/2.png"), "train/a"),
    (("train/train/a/1.png", "train/train/b/2.png"), "train/train"),
    (("1.png", "2.png"), ""),
]


@pytest.mark.parametrize(("names", "place"), NESTED)
def test_metadata_in_any_folder_above_pictures_is_read_as_imagefolder_reads_it(
    tmp_path: Path, names, place: str
) -> None:
    given, labels = tmp_path / "given", ("later", "early")
    rows = []
    for number, (name, label) in enumerate(zip(names, labels, strict=True)):
        (given / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(given / name)
        rows.append({"file_name": Path(name).relative_to(place).as_posix(), "label": label})
    labelled(given / place, rows, "jsonl")
    theirs = load_dataset(
        "imagefolder", data_dir=str(given), cache_dir=str(tmp_path), split="train"
    )
    meant = [(row["image"].getpixel((0, 0)), row["label"]) for row in theirs]
    for kind in ("jsonl", "csv", "parquet"):
        labelled(given / place, rows, kind)
        ours = open_dataset(given)
        seen = [(ours.read(i).getpixel((0, 0)), ours.classes[ours.labels[i]]) for i in range(2)]
        assert seen == meant
        (given / place / f"metadata.{kind}").unlink()


def test_metadata_above_splits_and_of_another_systems_slashes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_class_folders(tmp_path / "all" / split, {"a": 2})
    rows = [
        {"file_name": f"all\\{split}\\a\\{n}.png", "label": f"{split}{n}"}
        for split in ("train", "test")
        for n in range(2)
    ]
    labelled(tmp_path, rows, "csv")
    for split, first in (("train", 2), ("test", 0)):
        dataset = open_dataset(tmp_path, split=split)
        assert dataset.classes == ("test0", "test1", "train0", "train1")
        assert dataset.labels == [first, first + 1]
    labelled(tmp_path, [*rows, {"file_name": "train/a/0.png", "label": "x"}], "csv")
    with pytest.raises(ValueError, match=r"1 picture that is not there, .* train/a/0\.png"):
        open_dataset(tmp_path)


def test_files_that_are_no_folder_of_pictures_say_what_they_are(tmp_path: Path) -> None:
    for name, said in (
        ("set.zip", "is an archive: unpack it"),
        ("set.tar.gz", "is an archive: unpack it"),
        ("labels.csv", r"is a list: give the folder of its pictures; .*metadata\.csv"),
        ("train.txt", "is a list"),
        ("a.jpg", "is a single picture: give the folder"),
        ("model.bin", "is no parquet file"),
    ):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=said):
            open_dataset(tmp_path / name)


def test_limits_come_from_the_settings(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"a": 1, "b": 1}, size=20)
    small = open_dataset(tmp_path, max_pixels=399)
    with pytest.raises(ValueError, match="more than 399"):
        small.read(0)
    assert open_dataset(tmp_path, max_pixels=400).read(0).size == (20, 20)


def test_no_more_readers_start_than_there_are_batches(tmp_path: Path, monkeypatch) -> None:
    import revelio.data.loading as loading

    write_class_folders(tmp_path, {"a": 2, "b": 3})
    asked, real = [], loading.DataLoader

    def recorded(*given, num_workers, **more):
        asked.append(num_workers)
        return real(*given, num_workers=0, **more)

    monkeypatch.setattr(loading, "DataLoader", recorded)
    read = batches(open_folder(tmp_path), SquareTransform(4), 2, workers=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [len(batch) for batch in read] == [2, 2, 1]
    assert asked == [3]
