from pathlib import Path

import numpy as np
import pytest
from data_helpers import noise_picture, write_class_folders
from PIL import Image

from revelio.data.sources.folder import open_folder


def colours(dataset) -> list[tuple[int, int]]:
    """The class place and the number that each picture was painted with."""
    return [dataset.read(index).getpixel((0, 0))[:2] for index in range(len(dataset))]


def test_class_folders_become_labels_by_sorted_name(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "animals", {"zebra": 2, "Ant": 1, "bee": 3})
    dataset = open_folder(tmp_path / "animals")
    assert dataset.name == "animals" and dataset.split is None
    assert dataset.classes == ("Ant", "bee", "zebra")
    assert list(dataset.ids) == [
        *("Ant/0.png", "bee/0.png", "bee/1.png", "bee/2.png", "zebra/0.png", "zebra/1.png")
    ]
    assert dataset.labels == [0, 1, 1, 1, 2, 2]
    assert colours(dataset) == [(1, 0), (2, 0), (2, 1), (2, 2), (0, 0), (0, 1)]


def test_subsets_of_subsets_keep_id_label_and_picture_together(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"a": 3, "b": 3})
    part = open_folder(tmp_path).subset([5, 0, 4, 2]).subset([3, 0])
    assert (part.ids, part.labels) == (["a/2.png", "b/2.png"], [0, 1])
    assert colours(part) == [(0, 2), (1, 2)]


def test_plain_folders_have_no_labels(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpeg", "c.txt", ".hidden.png", "._a.jpeg"):
        (tmp_path / name).write_bytes(b"x")
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "b.PNG")
    dataset = open_folder(tmp_path)
    assert list(dataset.ids) == ["a.jpeg", "b.PNG"]
    assert dataset.labels is None and dataset.classes == ()
    assert dataset.read(1).getpixel((0, 0)) == (9, 8, 7)


def test_pictures_beside_folders_mean_no_labels_and_say_so(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"cats": 1, "dogs": 1})
    noise_picture(4, 4).save(tmp_path / "cover.png")
    with pytest.warns(UserWarning, match=r"cover\.png.*beside its folders \(cats.*no labels"):
        dataset = open_folder(tmp_path)
    assert list(dataset.ids) == ["cats/0.png", "cover.png", "dogs/0.png"]
    assert dataset.labels is None


def test_folders_inside_class_folders_belong_to_the_class(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "cats", {"big": 1, "small": 1})
    write_class_folders(tmp_path, {"dogs": 1})
    (tmp_path / ".ipynb_checkpoints").mkdir()
    dataset = open_folder(tmp_path)
    assert list(dataset.ids) == ["cats/big/0.png", "cats/small/0.png", "dogs/0.png"]
    assert dataset.labels == [0, 0, 1]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "real", {"cats": 2})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cats").symlink_to(tmp_path / "real" / "cats")
    (tmp_path / "real" / "cats" / "loop").symlink_to(tmp_path / "real" / "cats")
    assert list(open_folder(tmp_path / "data").ids) == ["cats/0.png", "cats/1.png"]


def test_split_folders_share_one_list_of_classes(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    write_class_folders(tmp_path / "test", {"c": 2, "a": 1})
    train, test = open_folder(tmp_path), open_folder(tmp_path, split="test")
    assert train.split == "train" and train.classes == test.classes == ("a", "b", "c")
    assert (test.ids, test.labels) == (["test/a/0.png", "test/c/0.png", "test/c/1.png"], [0, 2, 2])
    assert colours(test) == [(1, 0), (0, 0), (0, 1)]
    assert len(open_folder(tmp_path, split="all")) == 6
    with pytest.raises(ValueError, match=r"no split 'val'.*choose from test, train, all"):
        open_folder(tmp_path, split="val")


def test_lists_give_the_splits(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images", {"a": 2, "b": 3})
    (tmp_path / "train.txt").write_text("b/2.png\n\na/0.png\nb/tmp\n")
    (tmp_path / "test.txt").write_text("b/0.png\n")
    train = open_folder(tmp_path)
    assert (train.ids, train.labels, train.split) == (["a/0.png", "b/2.png"], [0, 1], "train")
    assert colours(train) == [(0, 0), (1, 2)]
    assert open_folder(tmp_path, split="test").ids == ["b/0.png"]
    # Every file of a split counts.
    (tmp_path / "Test_set.txt").write_text("b/1.png\n")
    assert open_folder(tmp_path, split="test").ids == ["b/0.png", "b/1.png"]
    (tmp_path / "Test_set.txt").unlink()
    assert open_folder(tmp_path, split="all").ids == ["a/0.png", "b/0.png", "b/2.png"]


def test_lists_that_name_what_is_not_there_or_twice(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images", {"a": 2})
    (tmp_path / "train.txt").write_text("a/0.png\na/7.png\na/8.png\n")
    with pytest.raises(ValueError, match=r"train\.txt lists 2 pictures.*the first is a/7\.png"):
        open_folder(tmp_path)
    (tmp_path / "train.txt").write_text("a/0.png\na/0.png\n")
    with pytest.raises(ValueError, match=r"lists a/0\.png twice"):
        open_folder(tmp_path)


def test_lists_of_pictures_without_classes_and_lists_of_something_else(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"images": 3})
    (tmp_path / "train.txt").write_text("0.png\n2.png\n")
    dataset = open_folder(tmp_path)
    assert (dataset.split, dataset.ids, dataset.labels) == ("train", ["0.png", "2.png"], None)
    (tmp_path / "train.txt").write_text("\n0.png 1\n2.png 0\n")  # of which none was taken, silently
    with pytest.raises(
        ValueError, match=r"train\.txt .*none of its pictures \(the first line is 0\.png 1"
    ):
        open_folder(tmp_path)


def test_what_holds_no_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder at .*gone"):
        open_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match="holds no images"):
        open_folder(tmp_path)
    write_class_folders(tmp_path, {"cats": 1})
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"class folder .*dogs holds no images"):
        open_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        open_folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no splits.*leave split out"):
        open_folder(tmp_path / "cats", split="train")


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in np.random.default_rng(0).permutation(30)]
    for name in names:
        noise_picture(2, 2).save(tmp_path / name)
    assert list(open_folder(tmp_path).ids) == sorted(names)
