"""Prompt policies, and zero-shot classes against CLIPModel's own logits."""

import pytest
import torch
from backbones_helpers import picture, tiny_clip
from transformers import CLIPModel, CLIPTokenizer

from revelio.backbones.prompts import ZeroShot, check_policy, class_texts, prompt_texts
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
    """A CLIP whose image embedding depends on the picture: random ones hardly look at it."""
    folder = tiny_clip(tmp_path_factory.mktemp("clip"), seed=4)
    model = CLIPModel.from_pretrained(folder)
    for name, parameter in model.vision_model.named_parameters():
        if name.endswith(("v_proj.weight", "out_proj.weight", "patch_embedding.weight")):
            parameter.data.mul_(20)
    model.save_pretrained(folder)
    return str(folder)


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
