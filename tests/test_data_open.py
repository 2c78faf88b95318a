import gzip
import struct
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.io
from data_helpers import png, write_class_folders
from PIL import Image

from revelio.data import registry
from revelio.data.builtin import BUILTIN
from revelio.data.config import DataConfig
from revelio.data.open import open_dataset
from revelio.data.registry import (
    class_prompts,
    dataset_names,
    generic_prompt,
    get_spec,
    register_dataset,
)
from revelio.data.spec import DatasetSpec


def paint(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(path, "PNG")


def reds(dataset) -> list[int]:
    return [dataset.read(index).getpixel((0, 0))[0] for index in range(len(dataset))]


def test_limit_spreads_evenly(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"a": 5, "b": 5})
    whole = open_dataset(tmp_path)
    assert open_dataset(tmp_path, limit=4).ids == [whole.ids[i] for i in (0, 2, 5, 7)]
    assert open_dataset(tmp_path, limit=10).ids == whole.ids
    assert open_dataset(tmp_path, limit=99).ids == whole.ids
    for limit in range(1, 10):
        kept = [list(whole.ids).index(i) for i in open_dataset(tmp_path, limit=limit).ids]
        assert len(set(kept)) == limit
        gaps = np.diff([*kept, 10])  # the first is always kept; steps differ by one at most
        assert kept[0] == 0 and gaps.max() - gaps.min() <= 1


def test_per_class_takes_the_first_of_each(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"a": 5, "b": 1, "c": 3})
    part = open_dataset(tmp_path, per_class=2)
    assert part.ids == ["a/0.png", "a/1.png", "b/0.png", "c/0.png", "c/1.png"]
    assert part.labels == [0, 0, 1, 2, 2]
    assert open_dataset(tmp_path, per_class=2, limit=2).ids == ["a/0.png", "b/0.png"]


def test_narrowing_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match=r"per_class needs labels and .* has none"):
        open_dataset(tmp_path, per_class=1)
    with pytest.raises(ValueError, match=r"limit=0: give 1 or more"):
        open_dataset(tmp_path, limit=0)


def test_unknown_sources_list_the_known_names(tmp_path: Path) -> None:
    for source in ("oxford-pets", str(tmp_path / "gone"), "./gone/away", "gone/away.parquet"):
        with pytest.raises(ValueError, match=r"no folder or file at .*oxford-iiit-pet, caltech101"):
            open_dataset(source)
    with pytest.raises(KeyError, match=r"no known data set 'pets': choose from samples"):
        get_spec("pets")
    with pytest.raises(ValueError, match=r"and .* is none"):
        open_dataset(tmp_path, root=tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"a\.zip is an archive: unpack it"):
        open_dataset(tmp_path / "a.zip")
    with pytest.raises(ValueError, match=r"no copy of caltech101 at .*images/<class>/ beside"):
        open_dataset("caltech101", root=tmp_path / "gone")


def test_the_official_records() -> None:
    assert dataset_names()[:4] == ("samples", "oxford-iiit-pet", "caltech101", "fgvc-aircraft")
    pet, aircraft = get_spec("oxford-iiit-pet"), get_spec("fgvc-aircraft")
    assert (pet.hub, pet.label_columns) == ("timm/oxford-iiit-pet", ("label",))
    assert pet.split_sizes == {"train": 3680, "test": 3669}
    assert (aircraft.hub, aircraft.label_columns) == ("dpdl-benchmark/fgvc_aircraft", ("variant",))
    assert sum(aircraft.split_sizes.values()) == 10_000
    caltech = get_spec("caltech101")
    assert caltech.hub == "dpdl-benchmark/caltech101" and sum(caltech.split_sizes.values()) == 9144
    counts = {"fashion-mnist": 10, "cifar10": 10, "flowers102": 102, "samples": 10}
    for name, count in counts.items():
        assert len(set(get_spec(name).classes)) == count


def test_prompts_say_the_class_in_the_data_sets_words() -> None:
    assert class_prompts("oxford-iiit-pet", ["american_bulldog", "Bengal"]) == [
        "A photo of a american bulldog, a type of pet.",
        "A photo of a Bengal, a type of pet.",
    ]
    assert class_prompts("caltech101", ["Faces", "wild_cat"]) == [
        "A photo of a face, an object.",
        "A photo of a wild cat, an object.",
    ]
    assert class_prompts("fgvc-aircraft", ["707-320"]) == ["A photo of a 707-320, an aircraft."]
    assert class_prompts("dtd", ["banded"]) == ["A photo of a banded, a texture."]
    assert class_prompts("my_photos", ["sea_side"]) == ["A photo of a sea side."]
    assert generic_prompt("oxford-iiit-pet") == "A photo of a pet"
    assert generic_prompt("my_photos") == "A photo"
    for spec in BUILTIN:
        assert spec.template.count("{}") == 1 and "{" not in spec.generic


def test_a_data_set_of_ones_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_specs", {})
    write_class_folders(tmp_path, {"oak": 1, "fir": 2})
    register_dataset(
        DatasetSpec("trees", "Trees", None, "A photo of a {} tree.", "A photo of a tree")
    )
    dataset = open_dataset("trees", root=tmp_path)
    assert (dataset.name, dataset.classes) == ("trees", ("fir", "oak"))
    assert class_prompts(dataset.name, dataset.classes)[1] == "A photo of a oak tree."
    with pytest.raises(ValueError, match=r"trees is not on the hub: give a local copy as root"):
        open_dataset("trees")
    with pytest.raises(ValueError, match="'trees' is registered already"):
        register_dataset(DatasetSpec("trees", "Trees", None))
    with pytest.raises(ValueError, match=r"must hold \{\} once"):
        register_dataset(DatasetSpec("bushes", "Bushes", None, template="A photo"))


def test_caltech_from_its_folder_and_lists(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images", {"BACKGROUND_Google": 2, "ant": 3})
    (tmp_path / "train.txt").write_text("ant/2.png\nBACKGROUND_Google/tmp\nant/0.png\n")
    (tmp_path / "test.txt").write_text("BACKGROUND_Google/1.png\n")
    train = open_dataset("caltech101", root=tmp_path)
    assert (train.name, train.split, train.labels) == ("caltech101", "train", [1, 1])
    test = open_dataset("caltech101", root=tmp_path, split="test")
    assert (test.ids, test.labels) == (["BACKGROUND_Google/1.png"], [0])
    assert train.classes == test.classes == ("BACKGROUND_Google", "ant")


def test_pets_from_their_archive(tmp_path: Path) -> None:
    lists = {"trainval": "Abyssinian_100 1 1 1\nbasset_hound_9 2 2 1\n", "test": "Bengal_3 3 1 2\n"}
    for name, text in lists.items():
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{name}.txt").write_text(f"#Image CLASS-ID SPECIES\n{text}")
    for red, stem in enumerate(("Abyssinian_100", "basset_hound_9", "Bengal_3")):
        paint(tmp_path / "images" / f"{stem}.jpg", red)
    train = open_dataset("oxford-iiit-pet", root=tmp_path)
    assert train.classes == ("Abyssinian", "basset_hound", "Bengal")
    assert (train.ids, train.labels) == (["Abyssinian_100.jpg", "basset_hound_9.jpg"], [0, 1])
    test = open_dataset("oxford-iiit-pet", root=tmp_path, split="test")
    assert (test.labels, reds(test), test.name) == ([2], [2], "oxford-iiit-pet")
    (tmp_path / "annotations" / "test.txt").write_text("Bengal_3 2 1 2\n")
    with pytest.raises(ValueError, match=r"test\.txt line 1 is not as expected: 'Bengal_3 2"):
        open_dataset("oxford-iiit-pet", root=tmp_path)
    (tmp_path / "annotations" / "test.txt").write_text(lists["test"])
    (tmp_path / "images" / "Bengal_3.jpg").unlink()
    with pytest.raises(ValueError, match=r"test\.txt lists 1 picture .* first is Bengal_3\.jpg"):
        open_dataset("oxford-iiit-pet", root=tmp_path, split="test")
    (tmp_path / "annotations" / "test.txt").write_text("Bengal_3\n")
    with pytest.raises(ValueError, match=r"test\.txt line 1 is not as expected: 'Bengal_3'"):
        open_dataset("oxford-iiit-pet", root=tmp_path)


def test_aircraft_from_their_archive(tmp_path: Path) -> None:
    data = tmp_path / "data"
    paint(data / "images" / "0034309.jpg", 1)
    paint(data / "images" / "1025794.jpg", 2)
    (data / "variants.txt").write_text("A300B4\n707-320\nDH-82 Tiger\n")
    (data / "images_variant_train.txt").write_text("1025794 DH-82 Tiger\n")
    (data / "images_variant_test.txt").write_text("0034309 707-320\n")
    train = open_dataset("fgvc-aircraft", root=tmp_path)
    assert train.classes == ("A300B4", "707-320", "DH-82 Tiger")
    assert (train.ids, train.labels, reds(train)) == (["1025794.jpg"], [2], [2])
    assert open_dataset("fgvc-aircraft", root=data, split="test").labels == [1]


def test_flowers_and_textures_from_their_archives(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        paint(tmp_path / "f" / "jpg" / f"image_{number:05d}.jpg", number)
    scipy.io.savemat(str(tmp_path / "f" / "imagelabels.mat"), {"labels": [[77, 1, 102]]})
    sets = {"trnid": [[3]], "valid": [[1]], "tstid": [[2]]}
    scipy.io.savemat(str(tmp_path / "f" / "setid.mat"), sets)
    train = open_dataset("flowers102", root=tmp_path / "f")
    assert (train.labels, reds(train)) == ([101], [3])
    validation = open_dataset("flowers102", root=tmp_path / "f", split="val")
    assert validation.classes[validation.labels[0]] == "passion flower"  # type: ignore[index]
    write_class_folders(tmp_path / "d" / "images", {"banded": 2, "zigzagged": 1})
    (tmp_path / "d" / "labels").mkdir()
    lines = {"train1": "zigzagged/0.png", "val1": "banded/1.png", "test1": "banded/0.png"}
    for stem, line in lines.items():
        (tmp_path / "d" / "labels" / f"{stem}.txt").write_text(line)
    textures = open_dataset("dtd", root=tmp_path / "d")
    assert (textures.ids, textures.labels) == (["zigzagged/0.png"], [1])


def write_idx(path: Path, values: np.ndarray, cut: int = 0) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content[: len(content) - cut]))


def test_fashion_mnist_from_idx_files(tmp_path: Path) -> None:
    for stem, start in (("train", 0), ("t10k", 100)):
        pictures = np.arange(start, start + 3)[:, None, None] * np.ones((3, 5, 4))
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", pictures)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.array([9, 0, 3]))
    test = open_dataset("fashion-mnist", root=tmp_path, split="test", limit=2)
    assert (test.ids, test.labels, reds(test)) == (["test/0", "test/1"], [9, 0], [100, 101])
    assert test.classes[9] == "Ankle boot" and test.read(0).size == (4, 5)
    assert len(open_dataset("fashion-mnist", root=tmp_path, split="all")) == 6
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.ones((3, 5, 4)), cut=7)
    with pytest.raises(ValueError, match=r"train-images.* is cut: 53 bytes of pixels"):
        open_dataset("fashion-mnist", root=tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.ones((2, 5, 4)))
    with pytest.raises(ValueError, match=r"labels \(shape \(3,\), up to 9\) don't fit"):
        open_dataset("fashion-mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("numbers", "names"),
    [
        ([8, 1, 0], ("airplane", "automobile", "ship")),
        ([10, 2, 1], ("airplane", "automobile", "truck")),  # 10 of ten: counted from 1
        ([8, 1], None),  # the last class may be missing, or the first
        ([9, 1], None),
        ([10, 0], None),  # more than there are
    ],
)
@pytest.mark.parametrize("form", ["column", "folders"])
def test_numbers_get_the_known_names_where_they_tell_which(
    tmp_path: Path, form: str, numbers: list[int], names
) -> None:
    if form == "folders":
        write_class_folders(tmp_path, {str(number): 1 for number in numbers})
    else:
        images = [{"bytes": png(Image.new("RGB", (2, 2), (place, 0, 0))), "path": None}
                  for place in range(len(numbers))]  # fmt: skip
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        data = datasets.Dataset.from_dict({"img": images, "label": numbers}, features=features)
        data.to_parquet(tmp_path / "train.parquet")
    said = nullcontext() if names else pytest.warns(UserWarning, match="they keep their numbers")
    with said:
        dataset = open_dataset("cifar10", root=tmp_path)
    assert dataset.name == "cifar10" and len(dataset.classes) == len(numbers)
    known = get_spec("cifar10").classes
    for index, red in enumerate(reds(dataset)):
        number = numbers[red]
        meant = known[number - (10 in numbers)] if names else str(number)
        assert dataset.classes[dataset.labels[index]] == meant
    assert names is None or dataset.classes == names


def test_classes_that_differ_only_in_case_or_spaces_are_said(tmp_path: Path) -> None:
    write_class_folders(tmp_path, {"Cat": 1, "cat ": 1, "dog": 1})
    with pytest.warns(
        UserWarning, match="the classes 'Cat' and 'cat ' differ only in case or spaces"
    ):
        assert len(open_dataset(tmp_path).classes) == 3


def test_a_known_data_set_needs_labels(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match=r"holds images without classes: it may be images/"):
        open_dataset("oxford-iiit-pet", root=tmp_path)


def test_the_shipped_samples_open() -> None:
    train, test = open_dataset("samples"), open_dataset("samples", split="test")
    assert train.name == "samples" and train.classes == get_spec("fashion-mnist").classes
    assert not set(train.ids) & set(test.ids)
    assert set(Counter(train.labels)) == set(range(10)) and train.read(0).size == (32, 32)


def test_one_declaration_of_settings_opens_a_data_set(tmp_path: Path, monkeypatch) -> None:
    config = DataConfig(source="samples", split="test", per_class=2, limit=7)
    whole = open_dataset(config)
    assert whole.ids == open_dataset("samples", split="test", per_class=2, limit=7).ids
    assert len(open_dataset(config, limit=3)) == 3
    assert len(open_dataset(limit=100)) == 100
    with pytest.raises(TypeError, match="lable_column"):
        open_dataset("samples", lable_column="x")
    # A path is never a known name.
    write_class_folders(tmp_path / "samples", {"oak": 1, "fir": 2})
    monkeypatch.chdir(tmp_path)
    assert open_dataset(Path("samples")).classes == ("fir", "oak")
    assert open_dataset("samples", limit=1).classes[0] == "T-shirt/top"
