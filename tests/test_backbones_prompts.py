"""Prompt policies, and zero-shot classes against CLIPModel's own logits."""

import csv
import json

import pytest
import torch
from backbones_helpers import picture, seeing_clip, tiny_if, tiny_pixart, tiny_sd, tiny_sdxl
from flow_helpers import tiny_flux, tiny_sd3
from transformers import CLIPModel, CLIPTokenizer

from revelio.backbones.prompts import (
    ZeroShot,
    captions_sha256,
    check_policy,
    class_texts,
    prompt_texts,
)
from revelio.backbones.registry import load_backbone
from revelio.data.dataset import ImageDataset, ImageError

CLASSES = ("golden_retriever", "cat", "Boeing 747")


def dataset(name="oxford-iiit-pet", classes=CLASSES, broken=()):
    def read(index):
        if index in broken:
            raise ImageError(str(index), "cut short")
        return picture(index)

    ids = [f"{i}.jpg" for i in range(7)]
    return ImageDataset(name, None, classes, ids, [0] * 7 if classes else None, read)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(seeing_clip(tmp_path_factory.mktemp("clip")))


def test_simple_policies_read_no_image():
    images = dataset(broken=range(7))
    assert prompt_texts("empty", images) == [""] * 7
    assert prompt_texts("fixed:a dog: it runs", images) == ["a dog: it runs"] * 7
    assert prompt_texts("generic", images) == ["A photo of a pet"] * 7
    assert prompt_texts("generic", dataset("dtd")) == ["A photo of a texture"] * 7
    assert prompt_texts("generic", dataset("my own")) == ["A photo"] * 7
    assert prompt_texts("generic", images, template="an animal") == ["an animal"] * 7


def test_class_names_go_into_the_template():
    texts = class_texts(dataset(), None)
    assert texts[0] == "A photo of a golden retriever, a type of pet."
    with pytest.raises(ValueError, match=r"has no {} where"):
        class_texts(dataset(), "a photo")


def expected_labels(clip, texts, count):
    """CLIPModel's own joint forward, which Revelio doesn't use."""
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    transform = load_backbone(clip, device="cpu").transform
    pixels = torch.stack([transform(picture(i)) for i in range(count)])
    rows = []
    with torch.no_grad():
        for text in texts:
            tokens = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
            rows.append(model(pixel_values=pixels, **tokens).logits_per_image[:, 0])
    return torch.stack(rows, dim=1).argmax(dim=1).tolist()


def test_from_clip_names_the_class_that_clip_sees(clip):
    template = "{} photo"
    texts = class_texts(dataset(), template)
    expected = [texts[label] for label in expected_labels(clip, texts, 7)]
    assert len(set(expected)) > 1
    found = prompt_texts(
        "from_clip", dataset(), template=template, clip=clip, device="cpu", batch_size=3
    )
    assert found == expected


def test_the_template_belongs_to_the_data_set(clip):
    found = prompt_texts("from_clip", dataset("fgvc-aircraft"), clip=clip, device="cpu")
    assert set(found) <= set(class_texts(dataset(), "A photo of a {}, an aircraft."))


def test_an_unreadable_image_stops_or_gets_the_empty_prompt(clip):
    whole = prompt_texts("from_clip", dataset(), clip=clip, device="cpu")
    images = dataset(broken=[2])
    with pytest.raises(ImageError, match="image 2 can't be read"):
        prompt_texts("from_clip", images, clip=clip, device="cpu")
    found = prompt_texts("from_clip", images, clip=clip, device="cpu", skip_unreadable=True)
    assert found == [*whole[:2], "", *whole[3:]]


def test_mistakes_are_named(clip):
    with pytest.raises(
        ValueError, match="unknown prompt policy 'clip': choose from empty, generic"
    ):
        prompt_texts("clip", dataset())
    with pytest.raises(ValueError, match="needs class names"):
        prompt_texts("from_clip", dataset(classes=()), clip=clip)
    assert check_policy("fixed:") == "fixed:"


def test_zero_shot_needs_a_whole_clip(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="is a dinov2: zero-shot prompts need a whole CLIPModel"):
        ZeroShot(str(tmp_path), ["a"])


def caption_files(folder, entries):
    """The same captions as CSV and as JSON Lines."""
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["image", "caption"])
        rows.writeheader()
        rows.writerows({"image": image, "caption": text} for image, text in entries)
    lines = [json.dumps({"file_name": image, "text": text, "score": 1}) for image, text in entries]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "captions.csv", folder / "captions.jsonl"


def test_captions_come_from_a_file_by_image_id(tmp_path):
    texts = ["a cat", "", 'two, "quoted"', "über\nzwei Zeilen", "a", "b", "c", "of no image"]
    entries = [*zip(dataset().ids, texts, strict=False), ("other.jpg", "of no image")]
    for path in caption_files(tmp_path, entries[::-1]):
        found = prompt_texts(f"captions:{path}", dataset(broken=range(7)))
        assert found == texts[:7]
        some = dataset().subset([4, 0])
        assert prompt_texts(f"captions:{path}", some) == ["a", "a cat"]


def test_a_changed_file_of_captions_has_another_hash(tmp_path):
    path, lines = caption_files(tmp_path, [("a.jpg", "a cat")])
    assert captions_sha256(["empty", "fixed:captions:"]) is None
    before = captions_sha256(["empty", f"captions:{path}"])
    assert before != captions_sha256([f"captions:{lines}"])
    path.write_text(path.read_text().replace("cat", "dog"))
    assert captions_sha256([f"captions:{path}"]) not in (before, None)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "image,caption\n0.jpg,a cat\n", "no caption for 6 of 7 images, such as 1.jpg"),
        ("a.csv", "image,caption\n0.jpg,a,cat\n", "a.csv, line 2 has 3 cells, its header 2"),
        ("a.csv", 'image,caption\n0.jpg,"a\n', "is not valid CSV"),
        ("a.csv", "", "has no header line"),
        ("a.csv", "picture,caption\n0.jpg,a\n", "entry 1 of .* no text in any of the fields image"),
        ("a.jsonl", '{"image": "0.jpg"}', "entry 1 of .* no text in any of the fields caption"),
        (
            "a.jsonl",
            '{"image": 3, "caption": "a"}',
            "entry 1 of .* no text in any of the fields image",
        ),
        (
            "a.jsonl",
            '{"id": "x", "text": "a"}\n{"id": "x", "text": "b"}',
            "a second, other caption",
        ),
        ("a.jsonl", "[]", "line 1 holds no object"),
        ("a.txt", "", "give a .csv or .jsonl file"),
        ("b/a.csv", None, "no file at"),
    ],
)
def test_a_file_that_lacks_captions_is_one_line(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        prompt_texts(f"captions:{tmp_path / name}", dataset())
    assert "\n" not in str(error.value)


def test_each_distinct_class_text_is_encoded_once(clip, monkeypatch):
    seen = []
    embed = ZeroShot._embed_text
    monkeypatch.setattr(
        ZeroShot, "_embed_text", lambda self, text: seen.append(text) or embed(self, text)
    )
    zero_shot = ZeroShot(clip, ["a cat", "a dog", "a cat"], "cpu")
    assert seen == ["a cat", "a dog"]
    assert torch.equal(zero_shot._text_rows[0], zero_shot._text_rows[2])


# Each family's builder, and how many folders its text encoders and tokenizers fill.
FAMILIES = {
    "sd": (tiny_sd, 2),
    "sdxl": (tiny_sdxl, 4),
    "deepfloyd": (tiny_if, 2),
    "pixart": (tiny_pixart, 2),
    "sd3": (tiny_sd3, 6),
    "flux": (tiny_flux, 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_or_empty_text_folder_is_an_error(family, tmp_path):
    build, count = FAMILIES[family]
    folder = build(tmp_path / "m")
    parts = [p for p in folder.iterdir() if p.name.startswith(("text_encoder", "tokenizer"))]
    assert len(parts) == count
    for part in parts:
        for empty in (False, True):
            part.rename(tmp_path / "away")
            if empty:
                part.mkdir()
            with pytest.raises(ValueError, match=part.name) as error:
                load_backbone(str(folder), image_size=32, device="cpu")
            assert "\n" not in str(error.value)
            if empty:
                part.rmdir()
            (tmp_path / "away").rename(part)
