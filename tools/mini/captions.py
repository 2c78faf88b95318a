"""Captions from class names: what a picture's class is called, and the sentences it is put in.

Names are those of the data sets made readable (`Ankle boot` -> `ankle boot`, `Motorbikes` ->
`motorbike`). Two classes that read the same (`airplane` of CIFAR-10, `airplanes` of Caltech-101)
share their captions, and so count as one class.
"""

from __future__ import annotations

import torch

from tools.mini.data import PictureSet

NOUNS = {
    "T-shirt/top": "t-shirt",
    "Trouser": "trousers",
    "Faces": "face",
    "Faces_easy": "face up close",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "water_lilly": "water lily",
}
PLAIN = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image of a {}")
TEMPLATES = {
    "fashion-mnist": (
        *PLAIN,
        "a product photo of a {}",
        "a black and white photo of a {}",
        "a photo of a {}, a piece of clothing",
    ),
    "caltech101": (
        *PLAIN,
        "a good photo of a {}",
        "a photo of one {}",
        "there is a {} in the photo",
    ),
    "cifar10": (
        *PLAIN,
        "a small photo of a {}",
        "a blurry photo of a {}",
        "a low resolution photo of a {}",
    ),
}
PROMPT = "a photo of a {}"


def noun(class_name: str) -> str:
    """A class name as it is put into a sentence."""
    return NOUNS.get(class_name, class_name.replace("_", " ").lower())


def nouns(pictures: PictureSet) -> list[str]:
    """The nouns of a data set's classes, in the order of its labels."""
    return [noun(name) for name in pictures.class_names]


def captions(data_set: str, word: str) -> list[str]:
    """All captions of one noun in one data set."""
    return [template.format(word) for template in TEMPLATES[data_set]]


def corpus(sets: list[PictureSet]) -> list[str]:
    """Every caption of the given data sets, once each, in a fixed order: what the tokenizer is trained on."""
    lines = [line for s in sets for word in nouns(s) for line in captions(s.name, word)]
    return list(dict.fromkeys(lines))


def draw_caption(data_set: str, word: str, generator: torch.Generator) -> str:
    """One of a noun's captions, all equally likely."""
    templates = TEMPLATES[data_set]
    chosen = int(torch.randint(len(templates), (1,), generator=generator))
    return templates[chosen].format(word)
