"""Labels by a table of any name, which the user gives beside a folder of pictures."""

from pathlib import Path

import pytest
from data_helpers import noise_picture, write_class_folders

from revelio.data.open import open_dataset


@pytest.mark.parametrize("table", ["train.csv", "labels.TSV"])
def test_a_table_of_labels_under_another_name_is_said(tmp_path: Path, table: str) -> None:
    for name in ("7.png", "8.png"):
        (tmp_path / "train").mkdir(exist_ok=True)
        noise_picture(4, 4).save(tmp_path / "train" / name)
    mark = "\t" if table.endswith("TSV") else ","
    (tmp_path / table).write_text(f'id{mark}breed\n7{mark}"pug"\n8{mark}"owl"\n')
    (tmp_path / "prices.csv").write_text("breed,price\npug,900\n")
    with pytest.warns(UserWarning, match=rf"{table} names pictures .*\(such as train/7\.png\)"):
        assert open_dataset(tmp_path).labels is None
    write_class_folders(tmp_path / "train", {"pug": 1, "owl": 1})
    for name in ("7.png", "8.png"):
        (tmp_path / "train" / name).rename(tmp_path / "train" / "pug" / name)
    assert open_dataset(tmp_path).classes == ("owl", "pug")  # has labels: nothing is said


# (pictures, the table's name, its text, the labels in the pictures' order)
TABLES = [
    (("00a.png", "00b.png"), "train.csv", "id,breed\n00b,pug\n00a,owl\n", "owl pug"),
    (("0001.png", "0002.png"), "l.csv", "image_id;label;x\n0001;10;3\n0002;9;4\n", "10 9"),
    (("train/1.png", "train/2.png"), "l.tsv", "f\tk\ntrain/1\tä\ntrain/2\tö\n", "ä ö"),
    (("0.png", "1.png", "2.png"), "l.csv", "kind,id\n1,0\n1,1\n0,2\n", "1 1 0"),
    (("a/1.png", "b/2.png"), "l.csv", "p,k\n/in/set/a/1.png,x\nC:\\set\\b\\2.png,y\n", "x y"),
    (("1.png", "2.png"), "l.jsonl", '{"id": 1, "k": ["x", "x"]}\n{"id": 2, "k": "y"}\n', "x y"),
]


@pytest.mark.parametrize(("names", "table", "text", "meant"), TABLES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_table_that_is_named_gives_the_labels(
    tmp_path: Path, names, table: str, text: str, meant: str, inside: bool
) -> None:
    folder = tmp_path / "pictures"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise_picture(4, 4).save(folder / name)
    place = (folder if inside else tmp_path) / table
    place.write_text(text, encoding="utf-8-sig")
    with pytest.warns(
        UserWarning, match=rf"labels are read from .*{table}: .* {len(names)} pictures"
    ):
        dataset = open_dataset(folder, labels=place)
    assert dataset.ids == sorted(names)
    assert [dataset.classes[label] for label in dataset.labels or ()] == meant.split()


@pytest.mark.parametrize("names", [("2023/raw", "2023/day", "2024/raw", "2024/day"), ("new", "")])
@pytest.mark.parametrize("table", ["labels.csv", "metadata.csv"])
def test_a_table_of_labels_makes_doubts_about_class_folders_moot(
    tmp_path: Path, names: tuple[str, ...], table: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Folders by year, or pictures beside folders: they matter where nothing else says the classes."""
    paths = [f"{name}/{number}.png".lstrip("/") for number, name in enumerate(names)]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        noise_picture(4, 4).save(tmp_path / path)
    with pytest.warns(
        UserWarning, match="taken as classes|no classes and the images have no labels"
    ):
        open_dataset(tmp_path)
    rows = [f"{path},{'pug' if number % 2 else 'owl'}" for number, path in enumerate(paths)]
    (tmp_path / table).write_text("\n".join(["file_name,label", *rows]) + "\n")
    recwarn.clear()
    named = {} if table == "metadata.csv" else {"labels": tmp_path / table}
    assert open_dataset(tmp_path, **named).classes == ("owl", "pug")
    said = [str(one.message) for one in recwarn]
    assert len(said) == len(named) and all("labels are read from" in one for one in said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,x\n1,y\n", "no header line"),
        ("id,k\n", "no rows below its header"),
        ("id,a,b\n0,x,u\n1,y,v\n", r"choose another label_column \(a, b\)"),
        ("id\n0\n1\n", "none beside the names"),
        ("id,k\n0,x\n7,y\n", "names 1 picture that is not in .* the first is 7"),
        ("id,k\n0,x\n0,y\n", r"gives 0\.png the label y, and x stood before"),
        ("id,k\n0,x\n1,\n", "row 1 has no label"),
        ("id,k\nq,x\nr,y\n", r"names no picture of .* \(id, k\)"),
        ("id,no,k\n0,1,x\n1,0,y\n", "id and no both name pictures: call the one"),
        ("id,k\n2,x\n", r"says '2', and several pictures are called so \(2\.bmp, 2\.png\)"),
    ],
)
def test_a_table_that_can_be_read_in_two_ways_or_none_is_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    for name in ("0.png", "1.png", "2.png", "2.bmp"):
        noise_picture(4, 4).save(tmp_path / name)
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        open_dataset(tmp_path, labels=tmp_path / "l.csv")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="labels is a table of a folder's pictures, and samples"):
        open_dataset("samples", labels=tmp_path / "l.csv")
