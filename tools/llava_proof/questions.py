"""Captions, questions and held-out questions about photographs with class names, in LLaVA's format.

Stage 1 gets captions; stage 2 gets, in one conversation a photograph, what is it (in several wordings), is it
a X, and which of four is it; the held-out questions are of the same three kinds. Everything is drawn with
generators keyed by the image, so a part of the classes or images has the questions that the whole has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import torch

from revelio.data.dataset import ImageDataset
from revelio.data.registry import spoken_name
from revelio.seeds import generator

Kind = Literal["open", "yes-no", "choice"]
KINDS: tuple[Kind, ...] = ("open", "yes-no", "choice")
CHOICES = 4
# The first is the one that held-out photographs are asked about.
OPEN_REQUESTS = (
    "What is this?",
    "What is in the picture?",
    "What does the photo show?",
    "Name what you see.",
)
CAPTION_REQUEST = "Describe the picture."
CAPTIONS = (
    "a photo of {}",
    "a picture of {}",
    "this is {}",
    "{}",
    "there is {} in the photo",
    "a good photo of {}",
)
SEED = 0


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        question_id: the image's id and the question's kind.
        image: the file, below the folder of images.
        category: which of the three kinds.
        text: what is asked.
        answer: the right answer, word for word.
        chance: how often a guess is right.
    """

    question_id: str
    image: str
    category: Kind
    text: str
    answer: str
    chance: float


@dataclass(frozen=True)
class Photos:
    """Labelled photographs that questions are made of.

    Attributes:
        files: one file name an image.
        labels: one class id an image.
        nouns: the classes as sentences say them.
    """

    files: tuple[str, ...]
    labels: tuple[int, ...]
    nouns: tuple[str, ...]


def choose_photos(
    dataset: ImageDataset, classes: Sequence[str], per_class: int, folder: str = ""
) -> Photos:
    """The first ``per_class`` images of each of ``classes``.

    Args:
        dataset: labelled, with ids that are files below a folder.
        classes: names of the data set's classes.
        per_class: at most so many images of each.
        folder: what the files' names begin with.

    Raises:
        ValueError: the data set has no labels, or lacks a class.
    """
    missing = [name for name in classes if name not in dataset.classes]
    if dataset.labels is None or missing:
        raise ValueError(
            f"{dataset.name} has no labels or no class {(missing or classes)[0]!r}: "
            "choose classes that it labels"
        )
    numbers = {dataset.classes.index(name): i for i, name in enumerate(classes)}
    kept: list[list[str]] = [[] for _ in classes]
    for image_id, label in zip(dataset.ids, dataset.labels, strict=True):
        place = numbers.get(int(label))
        if place is not None and len(kept[place]) < per_class:
            kept[place].append(f"{folder}{image_id}")
    return Photos(
        files=tuple(name for group in kept for name in group),
        labels=tuple(i for i, group in enumerate(kept) for _ in group),
        nouns=tuple(spoken_name(dataset.name, name).lower() for name in classes),
    )


def with_article(noun: str) -> str:
    """``a crab``, ``an ibis``."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def ask(
    photos: Photos, index: int, kind: Kind, seed: int = SEED, *, varied: bool = False
) -> Question:
    """The question of one kind about one image; ``varied`` draws the wording of an open one."""
    image, label = photos.files[index], photos.labels[index]
    random = generator(seed, "question", kind, image)
    noun = photos.nouns[label]
    others = [i for i in range(len(photos.nouns)) if i != label]
    order = torch.randperm(len(others), generator=random).tolist()
    if kind == "open":
        wording = torch.randint(len(OPEN_REQUESTS), (), generator=random) if varied else 0
        text, answer = OPEN_REQUESTS[int(wording)], with_article(noun)
        chance = 1 / len(photos.nouns)
    elif kind == "yes-no":
        right = bool(torch.randint(2, (), generator=random))
        asked = noun if right else photos.nouns[others[order[0]]]
        text, answer, chance = (f"Is this {with_article(asked)}?", "yes" if right else "no", 1 / 2)
    else:
        names = [noun, *(photos.nouns[others[i]] for i in order[: CHOICES - 1])]
        turn = torch.randperm(len(names), generator=random).tolist()
        listed = [names[i] for i in turn]
        text = f"Which is it: {', '.join(listed[:-1])} or {listed[-1]}?"
        answer, chance = noun, 1 / len(listed)
    return Question(f"{image}#{kind}", image, kind, text, answer, chance)


def captions(photos: Photos, a_photo: int, seed: int = SEED) -> list[dict[str, Any]]:
    """Stage 1's records: ``a_photo`` captions of every image, in a keyed random order."""
    records = []
    for image, label in zip(photos.files, photos.labels, strict=True):
        order = torch.randperm(len(CAPTIONS), generator=generator(seed, "caption", image)).tolist()
        for number, which in enumerate(order[:a_photo]):
            caption = CAPTIONS[which].format(with_article(photos.nouns[label]))
            records.append(_record(f"{image}#{number}", image, [(CAPTION_REQUEST, caption)]))
    return _shuffled(records, seed, "captions")


def instructions(photos: Photos, a_photo: int, seed: int = SEED) -> list[dict[str, Any]]:
    """Stage 2's records: a conversation an image of ``a_photo`` questions, the open one among them."""
    records = []
    for index, image in enumerate(photos.files):
        random = generator(seed, "kinds", image)
        others = [KINDS[1 + int(i)] for i in torch.randperm(len(KINDS) - 1, generator=random)]
        kinds = ["open", *others[: a_photo - 1]]
        order = torch.randperm(len(kinds), generator=random).tolist()
        turns = [ask(photos, index, kinds[i], seed, varied=True) for i in order]
        records.append(_record(image, image, [(turn.text, turn.answer) for turn in turns]))
    return _shuffled(records, seed, "instructions")


def held_out_questions(photos: Photos, seed: int = SEED) -> list[Question]:
    """The open question about every image, and by turns one of the other two."""
    kinds: Iterator[tuple[Kind, Kind]] = (("open", other) for other in cycle(KINDS[1:]))
    return [
        ask(photos, i, kind, seed)
        for i, some in zip(range(len(photos.files)), kinds, strict=False)
        for kind in some
    ]


def blind_images(photos: Photos, seed: int = SEED) -> dict[str, str]:
    """For every image one of another class, whose tokens a blind model is shown in its place."""
    shown = {}
    for image, label in zip(photos.files, photos.labels, strict=True):
        others = [i for i, other in enumerate(photos.labels) if other != label]
        pick = torch.randint(len(others), (), generator=generator(seed, "blind", image))
        shown[image] = photos.files[others[int(pick)]]
    return shown


def record(asked: Question, image: str | None = None) -> dict[str, Any]:
    """A question with its answer as LLaVA's data have it, about its own image or another."""
    return _record(asked.question_id, image or asked.image, [(asked.text, asked.answer)])


def _record(record_id: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    said = [
        {"from": role, "value": text}
        for request, reply in turns
        for role, text in (("human", request), ("gpt", reply))
    ]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": record_id, "image": image, "conversations": said}


def _shuffled(records: list[dict[str, Any]], seed: int, what: str) -> list[dict[str, Any]]:
    order = torch.randperm(len(records), generator=generator(seed, "order", what)).tolist()
    return [records[i] for i in order]
