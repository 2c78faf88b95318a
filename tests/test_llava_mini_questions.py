"""Questions about photographs: right answers, fair choices, blind images of another class."""

from collections import Counter

import pytest
from PIL import Image

from revelio.data.dataset import ImageDataset
from tools.llava_proof.questions import (
    CAPTIONS,
    OPEN_REQUESTS,
    Photos,
    ask,
    blind_images,
    captions,
    choose_photos,
    held_out_questions,
    instructions,
    record,
    with_article,
)

NOUNS = ("ant", "crab", "ibis", "pair of scissors", "watch")
PHOTOS = Photos(
    files=tuple(f"{i % 5}/{i}.jpg" for i in range(200)),
    labels=tuple(i % 5 for i in range(200)),
    nouns=NOUNS,
)


def test_every_answer_is_right_and_every_wrong_one_is_not() -> None:
    for index in range(200):
        noun = NOUNS[PHOTOS.labels[index]]
        assert ask(PHOTOS, index, "open").answer == with_article(noun)
        yes_no = ask(PHOTOS, index, "yes-no")
        assert (with_article(noun) in yes_no.text) == (yes_no.answer == "yes")
        choice = ask(PHOTOS, index, "choice")
        listed = choice.text.removeprefix("Which is it: ").rstrip("?").replace(" or ", ", ")
        assert choice.answer == noun
        assert len(set(listed.split(", "))) == 4
        assert noun in listed.split(", ")


def test_guessing_gains_nothing_on_average() -> None:
    yes = Counter(ask(PHOTOS, i, "yes-no").answer for i in range(200))["yes"]
    assert 80 <= yes <= 120
    first = sum(
        ask(PHOTOS, i, "choice").text.startswith(f"Which is it: {NOUNS[PHOTOS.labels[i]]},")
        for i in range(200)
    )
    assert 30 <= first <= 70  # a quarter of 200 is 50


def test_questions_depend_on_the_image_and_not_on_its_neighbours() -> None:
    part = Photos(PHOTOS.files[100:], PHOTOS.labels[100:], NOUNS)
    assert [ask(part, i, "choice") for i in range(20)] == [
        ask(PHOTOS, 100 + i, "choice") for i in range(20)
    ]


def test_captions_and_instructions_are_records_of_every_image() -> None:
    said = captions(PHOTOS, 2)
    assert Counter(entry["image"] for entry in said) == dict.fromkeys(PHOTOS.files, 2)
    assert len({entry["id"] for entry in said}) == 400
    known = {form.format(with_article(noun)) for form in CAPTIONS for noun in NOUNS}
    assert {entry["conversations"][1]["value"] for entry in said} <= known
    asked = instructions(PHOTOS, 2)
    assert Counter(entry["image"] for entry in asked) == dict.fromkeys(PHOTOS.files, 1)
    noun = dict(zip(PHOTOS.files, (NOUNS[i] for i in PHOTOS.labels), strict=True))
    for entry in asked:
        first, answer, second, other = (turn["value"] for turn in entry["conversations"])
        assert first.startswith("<image>\n")
        said = {first.removeprefix("<image>\n"): answer, second: other}
        (wording,) = said.keys() & set(OPEN_REQUESTS)
        assert said[wording] == with_article(noun[entry["image"]])
    firsts = Counter(entry["conversations"][0]["value"] for entry in asked)
    # Half of the conversations begin with the open question, in each of its wordings.
    assert all(10 <= firsts[f"<image>\n{wording}"] <= 40 for wording in OPEN_REQUESTS)


def test_every_held_out_photo_is_asked_openly_and_by_turns_otherwise() -> None:
    asked = held_out_questions(PHOTOS)
    assert Counter(one.image for one in asked) == dict.fromkeys(PHOTOS.files, 2)
    assert Counter(one.category for one in asked) == {"open": 200, "yes-no": 100, "choice": 100}
    assert {one.text for one in asked if one.category == "open"} == {OPEN_REQUESTS[0]}


def test_a_blind_image_is_of_another_class() -> None:
    label = dict(zip(PHOTOS.files, PHOTOS.labels, strict=True))
    shown = blind_images(PHOTOS)
    assert set(shown) == set(PHOTOS.files)
    assert all(label[image] != label[other] for image, other in shown.items())
    question = held_out_questions(PHOTOS)[0]
    assert record(question, "other.jpg")["image"] == "other.jpg"
    assert record(question)["image"] == question.image


def test_photos_are_chosen_by_class_and_a_class_that_is_not_there_is_named() -> None:
    dataset = ImageDataset(
        name="caltech101",
        split="train",
        classes=("Faces", "crab", "watch"),
        ids=["a", "b", "c", "d", "e"],
        labels=[0, 2, 1, 2, 2],
        read=lambda index: Image.new("RGB", (4, 4)),
    )
    photos = choose_photos(dataset, ("watch", "Faces"), 2, "images/")
    assert photos == Photos(("images/b", "images/d", "images/a"), (0, 0, 1), ("watch", "face"))
    with pytest.raises(ValueError, match="no class 'bat'"):
        choose_photos(dataset, ("bat",), 2)
