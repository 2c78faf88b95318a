import pickle
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import noise_picture, png
from PIL import Image

from revelio.data.dataset import ImageError
from revelio.data.open import open_dataset
from revelio.data.sources import parquet


def painted(number: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (number, 0, 0))


def rows(numbers: list[int], **columns: list) -> datasets.Dataset:
    """A set whose pictures are painted with ``numbers``; lists of class names make a ClassLabel."""
    named = columns.pop("classes", None)
    features = {"image": datasets.Image()}
    for column, values in columns.items():
        features[column] = datasets.Value("string" if isinstance(values[0], str) else "int64")
    if named is not None:
        features["label"] = datasets.ClassLabel(names=named)
    images = [{"bytes": png(painted(number)), "path": None} for number in numbers]
    return datasets.Dataset.from_dict(
        {"image": images, **columns}, features=datasets.Features(features)
    )


def reds(dataset) -> list[int]:
    return [dataset.read(index).getpixel((0, 0))[0] for index in range(len(dataset))]


def save(tmp_path: Path, splits: dict[str, datasets.Dataset]) -> Path:
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_set_with_class_names(tmp_path: Path) -> None:
    names = ["zebra", "ant", "bee"]
    path = save(
        tmp_path,
        {
            "train": rows([5, 6, 7], label=[2, 0, 2], classes=names),
            "test": rows([8], label=[1], classes=names),
        },
    )
    train = open_dataset(path)
    assert (train.split, train.classes, train.labels) == ("train", tuple(names), [2, 0, 2])
    assert train.ids == ["train/0", "train/1", "train/2"] and reds(train) == [5, 6, 7]
    test = open_dataset(str(path), split="test")
    assert (test.ids, test.labels, reds(test)) == (["test/0"], [1], [8])
    every = open_dataset(path, split="all")
    assert every.ids == [*train.ids, "test/0"] and reds(every) == [5, 6, 7, 8]
    with pytest.raises(ValueError, match=r"no split 'dev': choose from train, test, all"):
        open_dataset(path, split="dev")


def test_names_that_no_picture_has_are_no_classes(tmp_path: Path) -> None:
    """As in a data set that was filtered, of which only the features remember all names."""
    names, splits = list("zyxwv"), {"train": [1, 3, 1], "test": [3, 0]}
    path = save(
        tmp_path,
        {split: rows([5] * len(ids), label=ids, classes=names) for split, ids in splits.items()},
    )
    for split, ids in splits.items():
        dataset = open_dataset(path, split=split)
        assert dataset.classes == ("z", "y", "w")
        assert [dataset.classes[label] for label in dataset.labels] == [names[n] for n in ids]


def test_string_labels_are_sorted_over_all_splits(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        {
            "train": rows([1, 2, 3], label=["bee", "cow", "ant"]),
            "test": rows([4, 5], label=["cow", "bee"]),
        },
    )
    test = open_dataset(path, split="test")
    assert (test.classes, test.labels) == (("ant", "bee", "cow"), [2, 1])


def test_whole_number_labels_get_their_numbers_as_names(tmp_path: Path) -> None:
    path = save(tmp_path, {"train": rows([1, 2], label=[0, 4]), "test": rows([3], label=[1])})
    test = open_dataset(path, split="test")
    assert (test.classes, test.labels) == (("0", "1", "4"), [1])


@pytest.mark.parametrize("last", [12_057_009, 2**62])
def test_classes_are_the_ids_that_occur(tmp_path: Path, last: int) -> None:
    """WordNet's and iNaturalist's ids go to many millions; few of them are in a set."""
    path = save(tmp_path, {"train": rows([1, 2, 3, 4], label=[last, 7, last, 30_000_000])})
    dataset = open_dataset(path)
    assert dataset.classes == tuple(map(str, sorted({7, last, 30_000_000})))
    assert [int(dataset.classes[i]) for i in dataset.labels or ()] == [last, 7, last, 30_000_000]


@pytest.mark.parametrize(
    ("values", "feature", "what"),
    [
        ([[1], [2, 3]], datasets.List(datasets.Value("int64")), "lists"),
        ([["a"], []], datasets.List(datasets.Value("string")), "lists"),
        ([[1, 1], [0, 0]], datasets.List(datasets.Value("int64")), "lists"),  # two flags, no class
        ([{"a": 1}, {"a": 2}], {"a": datasets.Value("int64")}, "records"),
        ([0.5, 1.5], datasets.Value("float32"), ""),
        ([b"a", b"b"], datasets.Value("binary"), ""),
    ],
)
def test_a_label_column_of_something_else_is_one_line(
    tmp_path: Path, values, feature, what: str
) -> None:
    data = rows([1, 2]).add_column("label", values, feature=feature)  # type: ignore[arg-type]
    path = save(tmp_path, {"train": data})
    with pytest.raises(ValueError) as caught:
        open_dataset(path)
    said = str(caught.value)
    assert "'label' holds" in said and what in said and "another label_column" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("values", "feature", "meant"),
    [
        ([["b"], ["a"], ["b", "b"]], datasets.List(datasets.Value("string")), ["b", "a", "b"]),
        ([[30], [7], [30]], datasets.LargeList(datasets.Value("int64")), ["30", "7", "30"]),
        ([[1], [0], [1]], datasets.List(datasets.ClassLabel(names=["x", "y"])), ["y", "x", "y"]),
        ([[], None, []], datasets.List(datasets.Value("string")), []),
    ],
)
def test_lists_of_one_label_are_labels(tmp_path: Path, values, feature, meant: list[str]) -> None:
    data = rows([1, 2, 3]).add_column("label", values, feature=feature)  # type: ignore[arg-type]
    dataset = open_dataset(save(tmp_path, {"train": data}))
    assert [dataset.classes[label] for label in dataset.labels or ()] == meant


@pytest.mark.parametrize(("ids", "used"), [(["x", "y"], True), (["x", "x"], False)])
def test_ids_come_from_a_column_where_it_is_unique(tmp_path: Path, ids, used: bool) -> None:
    path = save(tmp_path, {"train": rows([1, 2], image_id=ids)})
    dataset = open_dataset(path)
    assert dataset.ids == (ids if used else ["train/0", "train/1"])
    assert dataset.labels is None and dataset.classes == ()


def test_missing_labels(tmp_path: Path) -> None:
    some = rows([1, 2, 3], label=[0, -1, 1], classes=["a", "b"])
    none = rows([4], label=[-1], classes=["a", "b"])
    path = save(tmp_path, {"train": some, "test": none})
    with pytest.raises(ValueError, match="'label': row 1 has no label"):
        open_dataset(path)
    assert open_dataset(path, split="test").labels is None


def test_columns_are_chosen_and_missing_ones_named(tmp_path: Path) -> None:
    data = rows([1, 2], label=[0, 1], family=["b", "a"]).rename_column("image", "img")
    path = save(tmp_path, {"train": data})
    with pytest.raises(
        ValueError, match=r"no column 'image'.*another image_column \(img, label, fam"
    ):
        open_dataset(path)
    dataset = open_dataset(path, image_column="img", label_column="family")
    assert (dataset.classes, dataset.labels) == (("a", "b"), [1, 0])
    with pytest.raises(ValueError, match=r"no column 'species'.*another label_column"):
        open_dataset(path, image_column="img", label_column="species")
    with pytest.raises(ValueError, match=r"'label' holds no pictures"):
        open_dataset(path, image_column="label")


def test_a_parquet_file_with_and_without_hub_features(tmp_path: Path) -> None:
    rows([3, 4], label=[1, 0], classes=["a", "b"]).to_parquet(tmp_path / "train.parquet")
    named = open_dataset(tmp_path / "train.parquet")
    assert (named.split, named.classes, named.ids) == ("train", ("a", "b"), ["train/0", "train/1"])
    assert reds(named) == [3, 4]
    table = pyarrow.table({"image": [png(painted(9)), png(painted(8))], "id": [70, 60]})
    pyarrow.parquet.write_table(table, tmp_path / "plain.parquet")
    plain = open_dataset(tmp_path / "plain.parquet")
    assert (plain.split, plain.ids, reds(plain)) == (None, ["70", "60"], [9, 8])
    assert plain.name == "plain"


def test_a_folder_of_parquet_files_by_split(tmp_path: Path) -> None:
    (tmp_path / "set" / "data").mkdir(parents=True)
    for number, name in enumerate(
        ["test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"]
    ):
        rows([number, number + 10]).to_parquet(tmp_path / "set" / "data" / f"{name}.parquet")
    train = open_dataset(tmp_path / "set")
    assert train.ids == [f"train/{row}" for row in range(4)] and reds(train) == [1, 11, 2, 12]
    assert reds(open_dataset(tmp_path / "set", split="test")) == [0, 10]


def test_a_split_column_makes_splits(tmp_path: Path) -> None:
    data = rows([1, 2, 3, 4], split=["test", "train", "test", "train"], label=["b", "a", "b", "c"])
    data.to_parquet(tmp_path / "samples.parquet")
    train = open_dataset(tmp_path / "samples.parquet")
    assert (train.ids, reds(train)) == (["train/0", "train/1"], [2, 4])
    test = open_dataset(tmp_path / "samples.parquet", split="test")
    assert (test.classes, test.labels, reds(test)) == (("a", "b", "c"), [1, 1], [1, 3])


def test_large_parquet_is_mapped_from_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows([3, 4], label=[1, 0], classes=["a", "b"]).to_parquet(tmp_path / "train.parquet")
    dataset = open_dataset(tmp_path / "train.parquet")
    assert dataset.read.rows.cache_files and reds(dataset) == [3, 4] and dataset.labels == [1, 0]


def test_a_broken_picture_is_named_and_the_rest_reads(tmp_path: Path) -> None:
    whole = png(noise_picture(20, 20))
    values = [whole, whole[:100], None]
    table = pyarrow.table({"image": pyarrow.array([{"bytes": v, "path": None} for v in values])})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    dataset = open_dataset(tmp_path / "train.parquet")
    assert dataset.read(0).size == (20, 20)
    with pytest.raises(ImageError, match="train/1"):
        dataset.read(1)
    with pytest.raises(ImageError, match="train/2 can't be read: the row holds no picture"):
        dataset.read(2)


def test_the_reader_goes_to_fresh_worker_processes(tmp_path: Path) -> None:
    rows([3, 4, 5]).to_parquet(tmp_path / "train.parquet")
    dataset = open_dataset(tmp_path / "train.parquet").subset([2, 0])
    assert reds(pickle.loads(pickle.dumps(dataset))) == [5, 3]  # noqa: S301 - our own bytes


def test_what_is_no_whole_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"^cut\.parquet can't be read as parquet"):
        open_dataset(tmp_path / "cut.parquet")
    path = save(tmp_path, {"train": rows([1])})
    (path / "train" / "dataset_info.json").unlink()
    (path / "train" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no whole saved data set") as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_one_clear_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    # The tests run with HF_HUB_OFFLINE=1: whatever is asked of the hub fails at once.
    with pytest.raises(ValueError, match=r"someone/photos can't be had from the Hugging") as caught:
        open_dataset("someone/photos")
    assert "no folder or file at someone/photos" in str(caught.value)
    with pytest.raises(
        ValueError, match=r"timm/oxford-iiit-pet can't be had.*known data set as root"
    ):
        open_dataset("oxford-iiit-pet")
    assert "\n" not in str(caught.value)


def test_the_hub_is_read_by_id(monkeypatch) -> None:
    loaded = datasets.DatasetDict({"train": rows([1], label=[0]), "test": rows([2], label=[0])})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision: loaded)
    with pytest.warns(UserWarning, match="of one class"):
        dataset = open_dataset("someone/photos", split="test")
    assert (dataset.name, dataset.split, reds(dataset)) == ("photos", "test", [2])
