"""LLaVA's JSON as it is, and one line for each way in which it can be wrong."""

import json
from pathlib import Path

import pytest
from backbones_helpers import picture
from llava_train_helpers import record, write_data

from llava_ext.conversation import Turn
from llava_ext.llava_json import Record, image_names, read_records


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def test_records_as_llava_ships_them(images: Path) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    both = [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "ho"}]
    data = [record(0), {"conversations": turns}, record(1, image=["1.png", "0.png"], id=5)]
    data[2]["conversations"] = both
    found = read_records(write_data(images / "d.json", data), images)
    assert found[0] == Record(
        "r0", ("0.png",), (Turn("user", "<image>\nwhat is it?"), Turn("assistant", "dog"))
    )
    assert (found[1].id, found[1].images) == ("1", ())
    assert (found[2].id, found[2].images) == ("5", ("1.png", "0.png"))
    assert image_names(found) == ["0.png", "1.png"]
    assert read_records(images / "d.json", images, limit=1) == found[:1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "9.png"}, "record 1 (id 'r1'): no image 9.png in"),
        (
            {"image": ["1.png", "2.png"]},
            "(id 'r1') has 2 pictures but 1 <image> in its text: put one <image> into",
        ),
        ({"image": None}, "but no picture: name in `image` one picture for each <image>, or take"),
        ({"image": 3}, "`image` 3"),
        ({"image": "../1.png"}, "is no image inside"),
        ({"image": "/etc/hosts"}, "is no image inside"),
        ({"image": "a\x1b[31m.png"}, "no image a"),
        ({"video": "a.mp4"}, "has a `video`"),
        ({"conversations": []}, "(id 'r1') has no `conversations`"),
        ({"conversations": None}, "has no `conversations`"),
        ({"conversations": [{"from": "human"}]}, "a turn without `from` and `value`"),
        ({"conversations": [{"from": "bot", "value": ""}]}, "from 'bot': allowed are human, gpt"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "it goes gpt"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "it goes human"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": "<image>"},
                ]
            },
            "only the human shows images",
        ),
    ],
)
def test_a_wrong_record_is_named(images: Path, change: dict, message: str) -> None:
    path = write_data(images / "d.json", [record(0), record(1, **change), record(2)])
    with pytest.raises(ValueError) as caught:
        read_records(path, images)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "record 1" in str(caught.value) or "'r1'" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "a list of records"),
        ("[]", "a list of records"),
        ("[3]", "record 0 is a int"),
        ("[", "valid"),
        ("", "valid"),
        ("[" * 100_000, "nested"),
        ("[[" + "[" * 100 + "]" * 100 + "]]", "nested"),
        ("[NaN]", "valid JSON"),
    ],
)
def test_a_wrong_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "d.json", tmp_path)


def test_what_is_not_there(images: Path) -> None:
    with pytest.raises(ValueError, match="no file at"):
        read_records(images / "none.json", images)
    path = write_data(images / "d.json", [record(0)])
    with pytest.raises(ValueError, match=r"`data\.images`"):
        read_records(path, images / "none")
    with pytest.raises(ValueError, match=r"'r0'\) has an image"):
        read_records(path)
    with pytest.raises(ValueError, match="limit is 0"):
        read_records(path, images, limit=0)
    assert json.loads(path.read_text())[0]["id"] == "r0"


def test_all_wrong_records_are_in_one_report(images: Path) -> None:
    wrong = {1: {"image": "9.png"}, 3: {"conversations": []}, 4: {"video": "x.mp4"}}
    data = [record(n % 3, id=f"r{n}", **wrong.get(n, {})) for n in range(6)]
    with pytest.raises(ValueError) as caught:
        read_records(write_data(images / "d.json", data), images)
    said = str(caught.value)
    assert "3 of 6 records are wrong" in said and "\n" not in said
    for number in range(6):
        assert (f"record {number} (id 'r{number}')" in said) == (number in wrong)
    many = [record(0, image="none.png") for _ in range(200)]
    with pytest.raises(ValueError) as caught:
        read_records(write_data(images / "d.json", many), images)
    said = str(caught.value)
    assert "200 of 200 records are wrong" in said and len(said) < 2000
    assert "also records 5, 6, 7" in said and "and 155 more" in said


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_json_lines_and_byte_order_marks(images: Path, mark: str, name: str) -> None:
    data = [record(0), record(1), record(2)]
    plain = read_records(write_data(images / "plain.json", data), images)
    whole = mark + json.dumps(data)
    lines = mark + "\n\n".join(json.dumps(one) for one in data) + "\n"
    for text in [lines] if name.endswith("l") else [whole, lines]:
        (images / name).write_text(text, encoding="utf-8")
        assert read_records(images / name, images) == plain
    (images / name).write_text(lines + "{]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="record 3: it is not valid JSON"):
        read_records(images / name, images)


BAD = [{"image": "9.png"}, {"video": "a.mp4"}, {"conversations": []}, {"image": 3}]


@pytest.mark.parametrize("change", BAD, ids=lambda change: next(iter(change)))
def test_bad_records_are_skipped_on_request(images: Path, change: dict) -> None:
    path = write_data(images / "d.json", [record(0), record(1, **change), record(2)])
    with pytest.raises(ValueError, match="`bad_records: skip` leaves them out"):
        read_records(path, images)
    with pytest.warns(UserWarning, match=r"left out: record 1 \(id 'r1'\)") as warned:
        found = read_records(path, images, bad="skip")
    assert [one.id for one in found] == ["r0", "r2"] and len(warned) == 1
    with pytest.raises(ValueError, match="record 0") as refused:
        read_records(write_data(path, [record(1, **change)]), images, bad="skip")
    assert "leaves them out" not in str(refused.value)
