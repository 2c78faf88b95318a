"""Towers beyond the paper: the question as the prompt, several layers and timesteps in one, a resampler."""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llava_helpers import (
    model_config,
    picture,
    tiny_language_tokenizer,
    tiny_llama,
    tower_configs,
)
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from llava_ext.asked import join_questions, question_in, split_questions
from llava_ext.chat import Dialogue
from llava_ext.checkpoint import save_model
from llava_ext.config import TowerConfig
from llava_ext.conversation import STYLES
from llava_ext.dataset import Collator, ConversationDataset, Pictures
from llava_ext.generate import Assistant
from llava_ext.images import image_id
from llava_ext.language import build_model
from llava_ext.llava_json import Record
from llava_ext.projector import Resampler, token_raster
from llava_ext.templates import Turn, render
from llava_ext.tower_cache import store_name
from llava_ext.towers import BackboneTower, Tower, load_tower, load_towers, look
from revelio.backbones.registry import load_backbone

QUESTIONS = ["is it a cat or a dog?", "what is in this picture?"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> TowerConfig:
    return tower_configs(tmp_path_factory.mktemp("towers"))["sd"]


def seen(tower: Tower, questions: list[str] | None = None) -> torch.Tensor:
    image = picture(3)
    pixels = torch.stack([tower.pixels(image)] * 2)
    return look(tower, pixels, [image_id(image)] * 2, questions)


def test_the_question_is_the_prompt_of_its_picture(sd: TowerConfig) -> None:
    tower = load_tower(replace(sd, prompt="question"), "cpu")
    found = seen(tower, QUESTIONS)
    backbone = load_backbone(sd.backbone, layers=["up_ft1"], device="cpu")
    for number, question in enumerate(QUESTIONS):
        pixels = backbone.transform(picture(3))[None]
        wanted = backbone.activations(
            backbone.encode(pixels),
            [image_id(picture(3))],
            ["up_ft1"],
            timestep=25,
            prompts=[question],
        )["up_ft1"][0]
        torch.testing.assert_close(found[number], wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    with pytest.raises(ValueError, match="prompted by the question, which is not known here"):
        seen(tower)
    with pytest.raises(ValueError, match="train without a cache"):
        store_name(tower.config)


def test_questions_reach_the_tower_in_training_and_in_answers(
    sd: TowerConfig, tmp_path: Path
) -> None:
    tower_config = replace(sd, prompt="question")
    config = model_config(tiny_llama(tmp_path / "lm"), tower_config, template="tokenizer")
    towers = load_towers(config, "cpu")
    model, tokenizer = build_model(config, towers)
    picture(3).save(tmp_path / "a.png")
    turns = [Turn("user", f"<image>\n{QUESTIONS[0]}"), Turn("assistant", "a cat")]
    records = [Record("r", ("a.png",), (*turns, Turn("user", "why?"), Turn("assistant", "no")))]
    pictures = Pictures(tmp_path, towers)
    dataset = ConversationDataset(records, tokenizer, config, model.image_tokens, pictures)
    batch = Collator(model.image_tokens, 0, pictures.stack)([dataset[0]])
    assert batch["questions"] == [QUESTIONS[0]]

    asked: list[list[str]] = []
    tower = towers[0]
    assert isinstance(tower, BackboneTower)
    given = tower.backbone.activations

    def spy(*arguments, prompts, **settings):
        asked.append(prompts)
        return given(*arguments, prompts=prompts, **settings)

    tower.backbone.activations = spy  # type: ignore[method-assign]
    assistant = Assistant(model, tokenizer, towers)
    prompts = [f"<image>\n{QUESTIONS[1]}", "<image><image> same?"]
    assistant.answer(prompts, [[picture(1)], [picture(1), picture(2)]], max_new_tokens=2)
    assert asked == [[QUESTIONS[1], "same?", "same?"]]

    asked.clear()
    talk = Dialogue(assistant, [picture(1)], StringIO())
    for question in QUESTIONS:  # the first one that is asked, and of a new talk its own
        talk.ask(question, max_new_tokens=2)
    talk.turns = []
    talk.ask("and now?", max_new_tokens=2)
    assert asked == [[QUESTIONS[0]], ["and now?"]]


@pytest.fixture(scope="module")
def asking(sd: TowerConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model one of whose two towers is prompted by the question."""
    root = tmp_path_factory.mktemp("asking")
    towers = (replace(sd, prompt="question"), tower_configs(root)["clip"])
    config = model_config(tiny_llama(root / "lm"), *towers, template="tokenizer")
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    with torch.no_grad():  # what is asked shall change what is answered
        for projector in model.projectors:
            cast(Any, projector).mlp[-1].weight.mul_(30)
    save_model(model, tokenizer, root / "model")
    return root / "model"


def test_a_processor_brings_the_question_to_the_tower(asking: Path, tmp_path: Path) -> None:
    """Tokens of `generate` and `pipeline`, alone and in a batch, saved again, are those of the chat path."""
    model: Any = AutoModelForImageTextToText.from_pretrained(asking)
    processor: Any = AutoProcessor.from_pretrained(asking)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    asked = [*QUESTIONS, "is it a dog?"]
    counts = [1, 2, 1]
    pictures = [[picture(number)] * count for number, count in enumerate(counts)]
    answers = Assistant.load(asking, device="cpu").answer(asked, pictures, max_new_tokens=4)
    blank = Assistant.load(asking, device="cpu").answer(["a"] * 3, pictures, max_new_tokens=4)
    assert len({*answers}) == 3 and answers != blank

    def talk(question: str, seen: list) -> list[dict]:
        parts = [{"type": "image", "image": one} for one in seen]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]

    talks = [talk(*pair) for pair in zip(asked, pictures, strict=True)]
    together = processor.apply_chat_template(talks, tokenize=True)
    assert set(together) == {*processor.model_input_names}
    assert split_questions(together["image_questions"]) == [asked[0], asked[1], asked[1], asked[2]]
    start = together["input_ids"].shape[1]
    rows = model.generate(**together, **settings)[:, start:]
    assert [text.strip() for text in processor.batch_decode(rows, True)] == answers

    # Saved again; the text made first, as transformers' users do; one by one; beams; an assistant.
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    for each, seen, answer in zip(talks, pictures, answers, strict=True):
        one = processor(images=seen, text=processor.apply_chat_template(each))
        by_ids = processor.apply_chat_template(each, tokenize=True)
        assert all(torch.equal(one[name], by_ids[name]) for name in by_ids)
        for more in ({}, {"prompt_lookup_num_tokens": 2})[: len(seen)]:
            found = model.generate(**one, **settings, **more)[0, one["input_ids"].shape[1] :]
            assert processor.decode(found, skip_special_tokens=True).strip() == answer
        with torch.no_grad():
            logits = model(**one).logits
            assert logits.argmax(-1)[0, -1] == found[0]
            other = join_questions(["a"] * len(seen))
            assert not torch.allclose(model(**one | {"image_questions": other}).logits, logits)
    assert len(model.generate(**together, **settings, num_beams=2)) == 3
    pipe: Any = pipeline("image-text-to-text", model=str(asking), device="cpu")
    for size in (1, 3):
        found = pipe(text=talks, return_full_text=False, batch_size=size, **_plain(settings))
        assert [one["generated_text"].strip() for (one,) in found] == answers

    with pytest.raises(ValueError, match="not known here: give all that one call"):
        model.generate(**{**one, "image_questions": None}, **settings)
    with pytest.raises(ValueError, match="1 question about 4 pictures"):
        model.generate(**{**together, "image_questions": one["image_questions"]}, **settings)
    with pytest.raises(ValueError, match="give `questions`, one a text"):
        processor(images=picture(0), text="<image> what is it?")
    given = processor(images=picture(0), text="<image> what is it?", questions=["x\u00e9?"])
    assert split_questions(given["image_questions"]) == ["x\u00e9?"]
    with pytest.raises(ValueError, match="2 questions for 1 prompt"):
        processor(images=picture(0), text="<image> a", questions=["x", "y"])
    assert "image_questions" not in processor(text="no picture, no question")


def _plain(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "pad_token_id"}


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<>[]|")), max_size=4),
)
def test_questions_are_the_same_out_of_their_bytes(questions: list[str]) -> None:
    assert split_questions(join_questions(questions)) == questions
    joined = torch.cat([join_questions([one]) for one in questions] or [join_questions([])])
    assert split_questions(joined) == questions


@pytest.mark.parametrize("template", [*STYLES, "tokenizer"])
@pytest.mark.parametrize("own", [None, "", "Be short."])
@pytest.mark.parametrize("given_system", [None, "Another one.\nUSER: what? ASSISTANT: "])
def test_the_first_question_is_found_in_every_template(
    template: str, own: str | None, given_system: str | None
) -> None:
    tokenizer = tiny_language_tokenizer()
    talk = [Turn("user", "<image>\nis it a cat,\nor a dog?"), Turn("assistant", "a cat")]
    system = own if given_system is None else given_system
    for turns in (talk[:1], [*talk, Turn("user", "why?")], [*talk, talk[0]]):
        if template == "plain":
            with pytest.raises(ValueError, match="can't be told"):
                question_in("<image>", template, own, tokenizer)
            continue
        text = "".join(part.text for part in render(template, turns, system, tokenizer))
        if template == "vicuna_v1" and given_system:
            continue  # its tags are words, which such a system message may hold
        assert question_in(text, template, own, tokenizer) == "is it a cat,\nor a dog?"


def test_several_layers_and_timesteps_are_one_tower(sd: TowerConfig) -> None:
    several = replace(
        sd, layer="up_ft1+bottleneck", timestep=None, timesteps=(25, 200), tokens="pool"
    )
    tower = load_tower(several, "cpu")
    found = seen(tower)
    backbone = load_backbone(sd.backbone, layers=["up_ft1", "bottleneck"], device="cpu")
    encoded = backbone.encode(backbone.transform(picture(3))[None])
    parts = []
    for timestep in (25, 200):
        layers = backbone.activations(
            encoded, [image_id(picture(3))], ["up_ft1", "bottleneck"], timestep=timestep
        )
        coarse = layers["bottleneck"][0]
        times = layers["up_ft1"].shape[-1] // coarse.shape[-1]
        parts += [
            layers["up_ft1"][0],
            coarse.repeat_interleave(times, 1).repeat_interleave(times, 2),
        ]
    wanted = torch.cat(parts)
    assert (tower.channels, *tower.grid) == tuple(wanted.shape)
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=1e-4)
    assert "t25-200" in store_name(several)
    old = load_tower(replace(sd, layer="up_ft1"), "cpu").identity()
    assert "timesteps" not in old, "caches of before stay valid"


def test_the_resampler_is_one_attention_of_learned_queries() -> None:
    torch.manual_seed(0)
    module = Resampler(channels=6, cells=12, budget=5, width=8)
    grids = torch.randn(2, 6, 3, 4)
    found = module(grids).detach().numpy()
    weights = {name: value.detach().numpy() for name, value in module.named_parameters()}
    for image in range(2):
        cells = grids[image].flatten(1).T.numpy()
        cells = (cells - cells.mean(1, keepdims=True)) / np.sqrt(cells.var(1, keepdims=True) + 1e-5)
        keys = cells @ weights["keys.weight"].T + weights["keys.bias"] + weights["places"]
        values = cells @ weights["values.weight"].T + weights["values.bias"]
        for token in range(5):
            score = np.exp(keys @ weights["queries"][token] / np.sqrt(8))
            mixed = (score / score.sum()) @ values
            wanted = mixed @ weights["out.weight"].T + weights["out.bias"]
            np.testing.assert_allclose(found[image, token], wanted, atol=1e-5)
    module(torch.empty(0, 6, 3, 4)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    config = TowerConfig("x", "y", tokens="resample", budget=7)
    assert token_raster(config, (3, 4)) == (1, 7)


def test_normalized_tokens_start_alike_whatever_their_scale() -> None:
    from llava_ext.projector import Projector

    config = TowerConfig("x", "y", tokens="pool", budget=4, normalize=True)
    torch.manual_seed(0)
    projector = Projector(config, 6, (4, 4), 8)
    grids = torch.randn(2, 6, 4, 4)
    torch.testing.assert_close(projector(100 * grids + 3), projector(grids), atol=1e-3, rtol=1e-3)
    tokens = torch.nn.functional.adaptive_avg_pool2d(grids, 2).flatten(2).transpose(1, 2)
    centred = tokens - tokens.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(projector(grids), projector.mlp(scaled), atol=1e-5, rtol=1e-4)
