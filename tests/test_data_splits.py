"""What folders of splits are called, and classes that only sound like splits."""

import re
import warnings
from pathlib import Path

import pytest
from data_helpers import write_class_folders

from revelio.data.sources.folder import open_folder
from revelio.data.splits import split_name

WORDS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")
KINDS = ("set", "data", "images", "imgs", "split", "2017", "1", "224x224")


@pytest.mark.parametrize("spelt", [str.lower, str.upper, str.title, lambda name: name])
@pytest.mark.parametrize("between", ["", "_", "-", " ", ".", "__", " - "])
def test_every_split_word_is_known_with_any_separator_in_any_case(between: str, spelt) -> None:
    for word in WORDS:
        meant = {"training": "train", "testing": "test"}.get(word, word)
        for kind in KINDS:
            for name in (f"{word}{between}{kind}", f"{kind}{between}{word}", f"({word})"):
                assert split_name(spelt(name)) == meant, name
    assert split_name(spelt(f"train{between}val")) == "trainval"
    for other in ("tube", "station", "s", "strip", "ed", "driver"):
        assert split_name(spelt(f"test{between}{other}")) is None


def test_words_inside_words_are_no_splits() -> None:
    inside = ("contest", "latest", "detrain", "devil", "evaluate", "vali", "trains", "restraint")
    for name in (*inside, "gallery", "fold1", "my_train", "été-train-été", "images", "2017", ""):
        assert split_name(name) is None
    assert split_name("1" * 250 + "z") is None  # at once


# (the top folders, what is in each, what is said; None: nothing)
CLASSES = [
    (("train", "car", "bus"), None, "train is taken as a class, like bus"),
    (("test tube", "beaker"), None, None),
    (("test tube", "test strip"), None, None),
    (("gallery", "kitchen", "hall"), None, None),
    (
        ("query", "gallery"),
        None,
        "gallery, query are taken as classes, though they are called like",
    ),
    (("trainA", "testA"), None, "called like splits"),
    (("photo", "sketch"), ("cat", "dog"), r"each holds the same folders \(cat, dog\)"),
    (("amazon/images", "dslr/images"), ("mug", "pen"), r"amazon, dslr are .* folders \(mug, pen\)"),
    (("cats", "dogs"), ("img",), None),
    (
        ("images", "masks"),
        None,
        r"images, masks are .* masks holds masks of the others, give .*images$",
    ),
]


@pytest.mark.parametrize(("folders", "inner", "said"), CLASSES)
def test_what_is_like_splits_is_said_and_classes_stay_classes(
    tmp_path: Path, folders, inner, said: str | None
) -> None:
    for folder in folders:
        write_class_folders(
            tmp_path / folder if inner else tmp_path, dict.fromkeys(inner or [folder], 1)
        )
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        dataset = open_folder(tmp_path)
    assert dataset.classes == tuple(sorted(folder.split("/")[0] for folder in folders))
    messages = [str(one.message) for one in given]
    assert len(messages) == (0 if said is None else 1)
    assert said is None or re.search(said, messages[0])


@pytest.mark.parametrize(
    "folders", [("fold1", "fold2"), ("query", "gallery"), ("Part 1", "Part 2")]
)
def test_parts_of_the_same_classes_are_splits_of_their_own_names(tmp_path: Path, folders) -> None:
    for folder in folders:
        write_class_folders(tmp_path / folder, {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=f"choose a split .*{folders[0]}"):
        open_folder(tmp_path)
    part = open_folder(tmp_path, split=folders[1])
    assert part.classes == ("cat", "dog") and part.ids[0] == f"{folders[1]}/cat/0.png"
    write_class_folders(tmp_path / "Training", {"cat": 2, "dog": 1})
    assert open_folder(tmp_path).split == "train" and len(open_folder(tmp_path, split="all")) == 7


def test_a_folder_around_the_classes_of_every_split_is_stepped_through(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_class_folders(tmp_path / split / "images", {"cat": 2, "dog": 1})
    dataset = open_folder(tmp_path, split="test")
    assert dataset.classes == ("cat", "dog") and dataset.ids[0] == "test/images/cat/0.png"


def test_a_split_without_classes_beside_others(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", {"cat": 2, "dog": 1})
    write_class_folders(tmp_path, {"test": 3})
    for folder in ("Annotations", "labels/train"):  # which only describe pictures
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.txt").write_text("0 .5 .5 1 1")
    assert open_folder(tmp_path).labels == [0, 0, 1]
    test = open_folder(tmp_path, split="test")
    assert (test.labels, test.classes, len(test)) == (None, (), 3)
    with pytest.raises(
        ValueError, match=r"some without \(test/0\.png.*choose one split \(test, train"
    ):
        open_folder(tmp_path, split="all")
